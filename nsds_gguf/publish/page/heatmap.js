// The heat map of tensors, its colours, and the keys that move over it.

const MODES = {
  bpw: { name: "type", title: "bits per weight" },
  error: { name: "error", title: "relative squared error" },
  sensitivity: { name: "sensitivity", title: "sensitivity" },
  loss: { name: "error × sensitivity", title: "error × sensitivity" },
};
let mode = "bpw";

function mapColour(cells) {
  if (mode === "bpw") return { scale: bitsScale(), legend: null, plain: "datum.plain" };
  const values = tensors.map((tensor) => tensor[mode]).filter((value) => value > 0);
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const legend =
    cells === layered
      ? {
          title: MODES[mode].title,
          orient: "top",
          gradientLength: 220,
          gradientThickness: 10,
          tickCount: 3,
          format: ".2~g",
        }
      : null;
  return {
    scale: { type: "log", scheme: scheme(), domain: [low, low < high ? high : low * 10], nice: false },
    legend,
    plain: `!(datum.${mode} > 0)`,
  };
}

// wide: layers run right, roles down; tall: the other way round; list: roles down, no layers.
function mapSpec(cells, orientation, width) {
  const { scale, legend, plain } = mapColour(cells);
  const onPlain = isDark() ? "#ffffff" : "#000000";
  const ink = `(${plain}) ? '${onPlain}' : luminance(scale('color', datum.${mode})) > 0.18 ? '#000000' : '#ffffff'`;
  const count = orientation === "wide" ? layerNumbers.length : mapRoles.length;
  const cell = orientation === "list" ? width : width / count;
  const tight = cell < 12;
  const role = (axis) => ({
    field: "role",
    type: "nominal",
    sort: orientation === "list" ? null : mapRoles,
    title: null,
    scale: { padding: tight ? 0 : 0.06 },
    axis: { ticks: false, domain: false, ...axis },
  });
  const layer = (axis) => ({
    field: "layer",
    type: "ordinal",
    scale: { domain: layerNumbers, padding: tight ? 0 : 0.06 },
    axis: { domain: false, ...axis },
  });
  const places = {
    wide: { x: layer(layerAxis(width)), y: role({ labelPadding: 6 }) },
    tall: {
      x: role({ orient: "top", labelAngle: -60, labelAlign: "left" }),
      y: layer({ ...layerAxis(Infinity), titleAngle: 0, titleAlign: "right", titleAnchor: "start", titleY: -8 }),
    },
    list: { y: role({ labelPadding: 6 }) },
  };
  const corner =
    cell >= 30 && orientation !== "list"
      ? { xOffset: cell / 2 - 7, yOffset: -6 }
      : orientation === "list"
        ? { xOffset: -cell / 2 + 12 }
        : {};
  const text = orientation === "list" ? "datum.type + ', ' + datum.size" : "datum.type";
  const base = { data: { name: "cells" }, encoding: places[orientation] };
  const layers = [
    {
      mark: {
        type: "rect",
        tooltip: { expr: "datum.tip" },
        cursor: "pointer",
        invalid: "show",
        stroke: tight ? null : colourOf("line"),
        strokeWidth: 0.5,
      },
      encoding: {
        color: {
          condition: { test: plain, value: colourOf("plain") },
          field: mode,
          type: "quantitative",
          scale,
          legend,
        },
        description: { field: "label" },
      },
    },
  ];
  const longest = Math.max(...cells.map((tensor) => tensor.type.length));
  const letter = cell >= 7 * longest + 8 ? 11.5 : 10;
  if (cell >= 0.62 * letter * longest + 5 || orientation === "list")
    layers.push({
      mark: { type: "text", fontSize: letter, aria: false, color: { expr: ink } },
      encoding: { text: { value: { expr: text } } },
    });
  for (const mark of Object.keys(MARK_SHAPES))
    layers.push({
      transform: [{ filter: `datum.mark === '${mark}'` }],
      mark: {
        type: "point",
        shape: MARK_SHAPES[mark],
        filled: true,
        opacity: 1,
        size: tight ? 22 : 34,
        color: { expr: ink },
        aria: false,
        ...corner,
      },
    });
  layers.push({
    transform: [{ filter: "datum.name === cursor" }],
    mark: { type: "rect", fillOpacity: 0, stroke: colourOf("ink"), strokeWidth: 2.5, aria: false },
  });
  return {
    ...base,
    params: [{ name: "cursor", value: "" }],
    datasets: { cells },
    height: { wide: 26 * mapRoles.length, tall: 18 * layerNumbers.length, list: 26 * cells.length }[orientation],
    layer: layers,
  };
}

const shown = {}; // by chart: its cells with their places, and which of them is picked

async function drawMap(id, cells, name) {
  const longest = Math.max(...cells.map((tensor) => tensor.role.length));
  const labels = 7 * Math.min(longest, 25) + 14;
  const room = $(id).parentElement.clientWidth;
  const least = room < NARROW ? 14 : 5;
  const orientation = cells === outside ? "list" : (room - labels) / layerNumbers.length >= least ? "wide" : "tall";
  const most = { wide: labels + 76 * layerNumbers.length, tall: 40 + 76 * mapRoles.length, list: labels + 260 }[
    orientation
  ];
  $(id).style.maxWidth = `${most}px`;
  const width = Math.min(room, most) - (orientation === "tall" ? 40 : labels);
  place(id, cells, orientation);
  const rows = cells.map((tensor) => ({ ...tensor, size: bytes(tensor.n_bytes) }));
  const view = await draw(id, `${name}: ${cells.length} tensors, coloured by ${MODES[mode].name}.`, {
    ...mapSpec(cells, orientation, width),
    datasets: { cells: rows },
  });
  view.addEventListener("click", (_, item) => item?.datum?.name && pick(id, item.datum.name));
  if (shown[id].picked) mark(id, shown[id].picked);
}

function place(id, cells, orientation) {
  const roles = orientation === "list" ? outside.map((tensor) => tensor.role) : mapRoles;
  const at = cells.map((tensor) => {
    const [layer, role] = [layerNumbers.indexOf(tensor.layer), roles.indexOf(tensor.role)];
    return { name: tensor.name, x: orientation === "tall" ? role : layer, y: orientation === "tall" ? layer : role };
  });
  shown[id] = { at, picked: shown[id]?.picked };
}

function mark(id, name) {
  for (const [other, view] of Object.entries(views)) {
    if (shown[other]) view.signal("cursor", other === id ? name : "").runAsync();
  }
}

function pick(id, name) {
  shown[id].picked = name;
  mark(id, name);
  const { title, ...rest } = tensors.find((tensor) => tensor.name === name).tip;
  const rows = Object.entries(rest).flatMap(([key, value]) => [el("dt", {}, key), el("dd", {}, value)]);
  $("picked-name").textContent = title;
  $("picked").replaceChildren(...rows);
  $("picked-panel").hidden = false;
}

function unpick() {
  for (const id of Object.keys(shown)) shown[id].picked = undefined;
  mark("", "");
  $("picked-panel").hidden = true;
}

const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

// The nearest cell in the direction of the arrow: in the same row or column, gaps are jumped over.
function step(event) {
  if (event.key === "Escape") unpick();
  const [dx, dy] = STEPS[event.key] ?? [0, 0];
  const { at, picked } = shown[event.currentTarget.id];
  if (!(dx || dy) || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  const from = at.find((cell) => cell.name === picked);
  const ahead = (cell) =>
    dx ? cell.y === from.y && (cell.x - from.x) * dx > 0 : cell.x === from.x && (cell.y - from.y) * dy > 0;
  const distance = (cell) => Math.abs(cell.x - from.x) + Math.abs(cell.y - from.y);
  const first = () => at.reduce((best, cell) => (cell.x + cell.y < best.x + best.y ? cell : best));
  const next = from ? at.filter(ahead).sort((a, b) => distance(a) - distance(b))[0] : first();
  if (next) pick(event.currentTarget.id, next.name);
}

function fillMapChoices() {
  const measured = Object.keys(MODES).filter((key) => key === "bpw" || tensors.some((tensor) => tensor[key] > 0));
  $("map-colours").append(
    ...measured.map((key) => {
      const input = el("input", { type: "radio", name: "colour", value: key, checked: key === mode });
      input.addEventListener("change", () => {
        mode = key;
        $("map-types").hidden = mode !== "bpw";
        drawMaps();
      });
      return el("label", {}, input, MODES[key].name);
    }),
  );
  $("map-colours").hidden = measured.length < 2;
  const words = { fixed: "fixed by --tensor-type", fallback: "fallback: no K-type fits the length of its rows" };
  const used = Object.keys(MARKS).filter((name) => tensors.some((tensor) => tensor.mark === name));
  $("map-marks").append(...used.map((name) => el("span", {}, `${MARKS[name]} ${words[name]}`)));
  const byBits = types.map((type) => tensors.find((tensor) => tensor.type === type)).sort((a, b) => a.bpw - b.bpw);
  $("map-types").append(...byBits.map(chip));
}
