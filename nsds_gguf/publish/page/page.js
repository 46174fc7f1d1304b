// Fills the page, draws it, and draws it again for another width or colour scheme.

function tile(title, value, small = "") {
  return el("div", {}, el("dt", {}, title), el("dd", {}, value, el("small", {}, small)));
}

function fillHeader() {
  $("kicker").textContent = data.kicker;
  $("title").textContent = data.title;
  const tiles = [
    tile("Size", bytes(data.file_bytes), data.target ? `asked for: ${data.target}` : `${whole(data.file_bytes)} bytes`),
    tile("Bits per weight", fixed(data.bpw, 2), `${fixed(data.quantized_bpw, 2)} of quantized tensors`),
    tile("Weights", weights(totalWeights), `${tensors.length} tensors`),
  ];
  if (found)
    tiles.push(
      tile(
        "Perplexity",
        `${fixed(found.ppl, 2)} ± ${fixed(found.ppl_error, 2)}`,
        known(found.reference_ppl)
          ? `reference: ${fixed(found.reference_ppl, 2)} ± ${fixed(found.reference_ppl_error, 2)}`
          : "no reference",
      ),
    );
  if (known(found?.kld_mean))
    tiles.push(tile("KL divergence", found.kld_mean.toPrecision(3), `± ${number(found.kld_error, 2)} nats per token`));
  $("tiles").append(...tiles);
  $("notes").append(...data.notes.map((note) => el("li", {}, note)));
  $("notes").hidden = !data.notes.length;
}

function fillTexts() {
  const stacks = unique(layered.map((tensor) => tensor.stack ?? ""));
  if (stacks.length > 1)
    $("stacks").textContent =
      `Layers of the same number are counted together: this file has ${stacks.length} stacks of them.`;
  const within = sum(layered, "n_bytes");
  const total = isPlan && !found ? "The planned file takes" : "The file takes";
  $("bytes-text").textContent =
    `${total} ${whole(data.file_bytes)} bytes: ${percent(within / data.file_bytes)} in ${layerNumbers.length} layers, ${percent(sum(outside, "n_bytes") / data.file_bytes)} in ${outside.length} tensors outside them, the rest in header and padding. Colours stand for bits per weight everywhere on this page; grey is not quantized.`;
  const meaning = isPlan
    ? "Error is the relative squared error at the chosen type; sensitivity is the predicted divergence per unit of it."
    : "A GGUF file does not record errors, sensitivities, or why a type was chosen; they are not shown.";
  $("map-text").textContent =
    `${layered.length} tensors in ${layerNumbers.length} layers and ${outside.length} outside. ${meaning}`;
  $("reproduce-text").textContent = isPlan
    ? `${data.given ? "The command as it was given, then the" : "The"} plan with every choice spelled out. Folders and files are named without their paths.`
    : "The command that made this file is not known; what its keys say is below.";
}

function fillLayers() {
  const text = $("layers-text");
  $("layers-figure").hidden = !data.layers.length;
  if (!data.layers.length) {
    text.textContent = isPlan
      ? "Not known here: the scores were not given. Pass them with --scores."
      : "Not known: a GGUF file does not hold the scores.";
    return;
  }
  const key = (symbol, colour, words) => [
    Object.assign(el("span", {}, symbol), { style: `color: var(--${colour})` }),
    words,
  ];
  if (hasParts) {
    text.replaceChildren(
      "Higher is more sensitive. Bars: the NSDS score of a layer, from ",
      ...key("●", "first", " P_NV, numerical vulnerability, and "),
      ...key("■", "second", " P_SE, structural expressiveness, each the layer's standing among all layers, 0 to 1."),
    );
  } else text.textContent = `Scored by ${data.metric}; higher is more sensitive.`;
  const parts = (kind) => unique(data.layers.flatMap((row) => Object.keys(row[kind] ?? {})));
  const columns = [
    { title: "layer", value: (row) => row.layer, text: true, head: true },
    { title: "score", value: (row) => row.score, show: (row) => number(row.score, 4) },
    ...(hasParts
      ? ["p_nv", "p_se"].map((name) => ({
          title: name.toUpperCase(),
          value: (row) => row[name],
          show: (row) => number(row[name]),
        }))
      : []),
    ...["nv", "se"].flatMap((kind) =>
      parts(kind).map((name) => ({
        title: `${kind.toUpperCase()} ${name}`,
        value: (row) => row[kind][name],
        show: (row) => number(row[kind][name]),
      })),
    ),
  ];
  sortableTable($("layers-table"), columns, data.layers);
}

// Title, value and its error: names of the measurement, percentiles as "kld_percentiles.50".
const VERIFICATION = [
  ["perplexity", "ppl", "ppl_error"],
  ["perplexity of the reference", "reference_ppl", "reference_ppl_error"],
  ["perplexity over the reference's", "ppl_ratio", "ppl_ratio_error"],
  ["correlation of log-probabilities", "log_ppl_correlation"],
  ["KL divergence, mean, nats per token", "kld_mean", "kld_error"],
  ["KL divergence, median", "kld_percentiles.50"],
  ["KL divergence, 99th percentile", "kld_percentiles.99"],
  ["KL divergence, 99.9th percentile", "kld_percentiles.99.9"],
  ["KL divergence, largest", "kld_percentiles.100"],
  ["change of the right token's probability, mean", "delta_p_mean", "delta_p_error"],
  ["change of the right token's probability, RMS", "delta_p_rms", "delta_p_rms_error"],
  ["same most likely token, fraction", "same_top", "same_top_error"],
  ["bits per byte of text", "bits_per_byte"],
  ["chunks", "n_chunks"],
  ["tokens of a chunk", "n_ctx"],
  ["tokens scored", "n_scored_tokens"],
  ["tokens of the text", "n_text_tokens"],
];

// The measurement with that of the divergence beside it; undefined without one.
const found = data.perplexity && { ...data.perplexity, ...data.perplexity.divergence };

function measured(name) {
  const [group, ...rest] = name.split(".");
  return rest.length ? found[group]?.[rest.join(".")] : found[name];
}

function fillVerification() {
  $("verification-table").hidden = !found;
  if (!found) {
    $("verification-text").textContent = "Not known here: this report was made without a measurement of perplexity.";
    return;
  }
  const against = data.reference === "original" ? "the original" : data.reference;
  $("verification-text").textContent =
    `Measured on ${data.text} with llama.cpp, in the way of llama-perplexity${against ? `, against ${against}` : ""}. ` +
    "Errors are standard errors of the mean over the scored tokens." +
    (found.n_chunks < found.n_chunks_wanted
      ? ` Interrupted after ${found.n_chunks} of ${found.n_chunks_wanted} chunks.`
      : "");
  const show = (value, digits) => (Number.isInteger(value) ? whole(value) : number(value, digits));
  const rows = VERIFICATION.map(([title, value, error]) => ({
    title,
    value: measured(value),
    error: error && measured(error),
  }));
  const columns = [
    { title: "quantity", value: (row) => row.title, text: true, head: true, wrap: true },
    { title: "value", value: (row) => row.value, show: (row) => show(row.value, 6) },
    { title: "± error", value: (row) => row.error, show: (row) => (known(row.error) ? show(row.error, 3) : "") },
  ];
  table(
    $("verification-table"),
    columns,
    rows.filter((row) => known(row.value)),
  );
}

function fillTables() {
  const kernels = { title: "CPU kernels", value: (row) => data.kernels[row.name] ?? "–", text: true };
  const columns = [...groupColumns("type", (row) => chip(row.first)), kernels];
  table($("types-table"), columns, groupRows("type"));
  sortableTable(
    $("roles-table"),
    groupColumns("role", (row) => row.name),
    groupRows("role"),
  );
  const { rows } = sortableTable($("tensors-table"), tensorColumns(), tensors);
  const filter = () => filterTensors([...rows]);
  $("filter").addEventListener("input", filter);
  filter();
}

function filterTensors(rows) {
  const words = $("filter").value.toLowerCase().split(/\s+/);
  for (const row of rows) {
    const text = [row.record.name, row.record.type, row.record.reason ?? "", row.record.why ?? ""]
      .join(" ")
      .toLowerCase();
    row.hidden = !words.every((word) => text.includes(word));
  }
  $("count").textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length}`;
}

// Lines break between words, not after the dashes of a flag.
function commandBlock(command) {
  const words = command.split(" ").flatMap((word, i) => [i ? " " : "", el("span", {}, word)]);
  return el("pre", { tabIndex: 0 }, ...words);
}

function fillReproduction() {
  $("commands").append(...[data.given, data.command].filter(Boolean).map(commandBlock));
  $("facts").append(...data.facts.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
}

async function drawMaps() {
  if (layered.length) await drawMap("map-chart", layered, "Heat map of the tensors of the layers");
  if (outside.length) await drawMap("outside-chart", outside, "Tensors outside the layers");
}

async function drawAll() {
  document.body.dataset.state = "drawing";
  shareColours(await drawRoles());
  if (layered.length) await drawLayerBytes();
  if (data.layers.length) await drawLayers();
  await drawMaps();
  document.body.dataset.state = "ready";
}

let redrawing = Promise.resolve();
const redraw = () => {
  redrawing = redrawing.then(drawAll);
};

function watch() {
  let width = document.documentElement.clientWidth;
  let timer;
  addEventListener("resize", () => {
    if (document.documentElement.clientWidth === width) return; // a phone's address bar came or went
    width = document.documentElement.clientWidth;
    clearTimeout(timer);
    timer = setTimeout(redraw, 150);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
}

fillHeader();
fillTexts();
fillLayers();
fillMapChoices();
fillVerification();
fillTables();
fillReproduction();
$("layer-bytes").hidden = !layered.length;
$("map-chart").parentElement.hidden = !layered.length;
$("outside").hidden = !outside.length;
for (const id of ["map-chart", "outside-chart"]) $(id).addEventListener("keydown", step);
$("unpick").addEventListener("click", unpick);
watch();
redraw();
