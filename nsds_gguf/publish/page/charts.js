// The charts of bytes and layers, drawn by Vega-Lite.

const views = {};

function config() {
  const [ink, muted, line] = ["ink", "muted", "line"].map(colourOf);
  const font = getComputedStyle(document.body).fontFamily;
  const axis = {
    labelColor: ink,
    titleColor: muted,
    domainColor: line,
    tickColor: line,
    gridColor: line,
    labelFontSize: 12,
    titleFontSize: 12,
    titleFontWeight: 400,
    labelLimit: 180,
  };
  return {
    background: null,
    font,
    view: { stroke: null },
    axis,
    legend: { labelColor: ink, titleColor: muted, titleFontWeight: 400, labelFontSize: 12, titleFontSize: 12 },
    text: { color: ink, fontSize: 12 },
  };
}

async function draw(id, description, spec) {
  views[id]?.finalize();
  delete views[id];
  const full = { description, width: "container", autosize: { contains: "padding" }, config: config(), ...spec };
  const options = {
    actions: false,
    renderer: "svg",
    ast: true,
    mode: "vega-lite",
    tooltip: { disableDefaultStyle: true },
  };
  const result = await vegaEmbed($(id), full, options);
  views[id] = result.view;
  return result.view;
}

// Labels of layers: all, or every 2nd, 5th, 10th, … as there is room.
function layerAxis(pixels, extra = {}) {
  const room = Math.max(1, Math.floor(pixels / 26));
  const step = [1, 2, 5, 10, 20, 50, 100].find((each) => layerNumbers.length / each <= room) ?? 200;
  return {
    title: "layer",
    labelAngle: 0,
    labelOverlap: false,
    ticks: false,
    values: layerNumbers.filter((layer) => layer % step === 0),
    ...extra,
  };
}

const layerScale = (domain) => ({ domain, padding: domain.length > 60 ? 0.12 : 0.2 });

function byteParts(rows, key) {
  const parts = groups(rows, key).flatMap(([name, members]) =>
    groups(members, "type").map(([type, same]) => {
      const size = sum(same, "n_bytes");
      const tip = {
        title: key === "layer" ? `layer ${name}` : name,
        type,
        tensors: same.length,
        bytes: `${whole(size)} (${percent(size / data.file_bytes)} of the file)`,
      };
      return {
        name,
        size,
        tip,
        bpw: same[0].bpw,
        plain: same[0].plain,
        label: `${tip.title}: ${type}, ${bytes(size)}`,
      };
    }),
  );
  return parts;
}

// Viridis, which colour-blind eyes read too, without the end that fades into the paper.
const isDark = () => matchMedia("(prefers-color-scheme: dark)").matches;
const scheme = () => ({ name: "viridis", extent: isDark() ? [0.18, 1] : [0, 0.95] });

// The same colour for the same bits per weight in every report.
const bitsScale = () => ({ type: "log", scheme: scheme(), reverse: true, domain: [1.8, 8.5], clamp: true });

function typeColour() {
  const plain = { test: "datum.plain", value: colourOf("plain") };
  return { condition: plain, field: "bpw", type: "quantitative", scale: bitsScale(), legend: null };
}

// Give the colours of the charts to the chips in tables and text.
function shareColours(view) {
  types.forEach((type, i) => {
    const { bpw } = tensors.find((tensor) => tensor.type === type);
    document.documentElement.style.setProperty(`--type-${i}`, view.scale("color")(bpw));
  });
}

function drawRoles() {
  const rest = data.file_bytes - sum(tensors, "n_bytes");
  const restName = "header, padding";
  const tip = { title: restName, bytes: `${whole(rest)} (${percent(rest / data.file_bytes)} of the file)` };
  const parts = [
    ...byteParts(tensors, "role"),
    { name: restName, size: rest, tip, bpw: 0, plain: true, label: `${restName}: ${bytes(rest)}` },
  ];
  const totals = groups(parts, "name")
    .map(([name, members]) => ({ name, size: sum(members, "size") }))
    .sort((a, b) => b.size - a.size);
  const narrow = $("roles-chart").clientWidth < NARROW;
  const power = unitPower(totals[0].size);
  const scaled = (rows) =>
    rows.map((row) => ({
      ...row,
      size: row.size / 1024 ** power,
      total: `${narrow ? "" : `${bytes(row.size)}, `}${percent(row.size / data.file_bytes)}`,
    }));
  const y = {
    field: "name",
    type: "nominal",
    sort: totals.map((row) => row.name),
    title: null,
    axis: { ticks: false, domain: false, labelPadding: 6 },
  };
  const x = {
    field: "size",
    type: "quantitative",
    title: UNITS[power],
    scale: { domainMax: (totals[0].size / 1024 ** power) * (narrow ? 1.35 : 1.2), nice: false },
    axis: { tickCount: 5 },
  };
  return draw(
    "roles-chart",
    `Bars: bytes by role, largest first. ${totals
      .slice(0, 3)
      .map((row) => `${row.name} ${percent(row.size / data.file_bytes)}`)
      .join(", ")}.`,
    {
      height: 24 * totals.length,
      layer: [
        {
          data: { values: scaled(parts) },
          mark: { type: "bar", stroke: colourOf("paper"), strokeWidth: 0.5, tooltip: { expr: "datum.tip" } },
          encoding: {
            x: { ...x, stack: "zero" },
            y,
            order: { field: "bpw" },
            color: typeColour(),
            description: { field: "label" },
          },
        },
        {
          data: { values: scaled(totals) },
          mark: { type: "text", align: "left", dx: 5, aria: false },
          encoding: { x, y, text: { field: "total" } },
        },
      ],
    },
  );
}

function drawLayerBytes() {
  const parts = byteParts(layered, "layer");
  const power = unitPower(Math.max(...groups(parts, "name").map(([, members]) => sum(members, "size"))));
  const values = parts.map((part) => ({ ...part, size: part.size / 1024 ** power }));
  return draw("layer-bytes-chart", `Bars: bytes of each of ${layerNumbers.length} layers, by type.`, {
    height: 170,
    data: { values },
    mark: { type: "bar", tooltip: { expr: "datum.tip" } },
    encoding: {
      x: {
        field: "name",
        type: "ordinal",
        scale: layerScale(layerNumbers),
        axis: layerAxis($("layer-bytes-chart").clientWidth - 50),
      },
      y: {
        field: "size",
        type: "quantitative",
        stack: "zero",
        title: UNITS[power],
        axis: { tickCount: 4, domain: false, ticks: false },
      },
      order: { field: "bpw" },
      color: typeColour(),
      description: { field: "label" },
    },
  });
}

const hasParts = data.layers.some((layer) => known(layer.p_nv));

function layerPoints(key, name, shape, colour) {
  const values = data.layers
    .filter((row) => known(row[key]))
    .map((row) => ({
      layer: row.layer,
      value: row[key],
      tip: layerTip(row),
      label: `layer ${row.layer}: ${name} ${number(row[key])}`,
    }));
  const pitch = ($("layers-chart").clientWidth - 50) / data.layers.length;
  const size = pitch > 20 ? 60 : pitch > 5 ? 24 : 9;
  const aside = (pitch > 20 ? 6 : 0) * { circle: -1, square: 1 }[shape] * hasParts; // equal values stay apart
  return {
    data: { values },
    mark: {
      type: "point",
      shape,
      size,
      xOffset: aside,
      filled: true,
      opacity: 1,
      color: colourOf(colour),
      stroke: colourOf("paper"),
      strokeWidth: 0.5,
      tooltip: { expr: "datum.tip" },
    },
  };
}

function layerTip(row) {
  const tip = { title: `layer ${row.layer}`, [data.metric ?? "score"]: number(row.score) };
  if (known(row.p_nv)) tip.P_NV = number(row.p_nv);
  if (known(row.p_se)) tip.P_SE = number(row.p_se);
  return tip;
}

function drawLayers() {
  const numbers = data.layers.map((row) => row.layer);
  const scores = data.layers.map((row) => ({
    layer: row.layer,
    value: row.score,
    tip: layerTip(row),
    label: `layer ${row.layer}: score ${number(row.score)}`,
  }));
  const bars = {
    data: { values: scores },
    mark: { type: "bar", color: colourOf("bar"), tooltip: { expr: "datum.tip" } },
  };
  const layer = hasParts
    ? [bars, layerPoints("p_nv", "P_NV", "circle", "first"), layerPoints("p_se", "P_SE", "square", "second")]
    : [layerPoints("score", data.metric, "circle", "first")];
  return draw(
    "layers-chart",
    `Score of each of ${numbers.length} layers by ${data.metric}; higher is more sensitive.`,
    {
      height: 200,
      layer,
      encoding: {
        x: {
          field: "layer",
          type: "ordinal",
          scale: layerScale(numbers),
          axis: layerAxis($("layers-chart").clientWidth - 50),
        },
        y: {
          field: "value",
          type: "quantitative",
          title: hasParts ? "score" : data.metric,
          scale: hasParts ? { domain: [0, 1] } : { zero: false },
          axis: { tickCount: 5, domain: false, ticks: false },
        },
        description: { field: "label" },
      },
    },
  );
}
