// The data of the page and how its numbers are written. Text only ever becomes text nodes, never markup.
const data = JSON.parse(document.getElementById("data").textContent);
const isPlan = data.kind === "plan";
const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];
const MARKS = { fixed: "◆", fallback: "▲" };
const MARK_SHAPES = { fixed: "diamond", fallback: "triangle-up" };
const NARROW = 560; // pixels of a chart below which layers run down the page

const $ = (id) => document.getElementById(id);
const known = (value) => value !== null && value !== undefined;
const sum = (rows, key) => rows.reduce((total, row) => total + row[key], 0);
const unique = (values) => [...new Set(values)];
const colourOf = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

function el(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

function number(value, digits = 3) {
  if (!known(value)) return "–";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e6) return String(value);
  if (size < 1e-4 || size >= 1e6) return value.toExponential(digits - 1);
  return size < 10 ** digits ? value.toPrecision(digits) : value.toFixed(0);
}

const fixed = (value, digits) => (known(value) ? value.toFixed(digits) : "–");
const whole = (value) => (known(value) ? value.toLocaleString("en") : "–");
const percent = (value) => (value >= 0.001 || value === 0 ? `${(100 * value).toFixed(1)} %` : "< 0.1 %");
const unitPower = (bytes) => Math.min(UNITS.length - 1, Math.max(0, Math.floor(Math.log2(bytes || 1) / 10)));

function bytes(value) {
  const power = unitPower(value);
  return `${number(value / 1024 ** power)} ${UNITS[power]}`;
}

function weights(value) {
  const [unit, name] = value >= 1e9 ? [1e9, "billion"] : value >= 1e6 ? [1e6, "million"] : [1, ""];
  return `${unit > 1 ? number(value / unit) : whole(value)} ${name}`.trim();
}

const columns = Object.entries(data.tensors);
const tensors = data.tensors.name.map((_, i) => {
  const tensor = Object.fromEntries(columns.map(([key, values]) => [key, values[i]]));
  tensor.n_weights = tensor.shape.reduce((product, size) => product * size, 1);
  tensor.bpw = tensor.n_weights ? (tensor.n_bytes * 8) / tensor.n_weights : 0;
  tensor.plain = data.unquantized.includes(tensor.type);
  tensor.share = tensor.n_bytes / data.file_bytes;
  tensor.loss = known(tensor.error) && known(tensor.sensitivity) ? tensor.error * tensor.sensitivity : null;
  tensor.mark = tensor.kind in MARKS ? tensor.kind : "";
  tensor.tip = tipOf(tensor);
  tensor.label = `${tensor.name}: ${Object.entries(tensor.tip)
    .slice(1)
    .map((pair) => pair.join(" "))
    .join(", ")}`;
  return tensor;
});
const layered = tensors.filter((tensor) => known(tensor.layer));
const outside = tensors.filter((tensor) => !known(tensor.layer));
const layerNumbers = unique(layered.map((tensor) => tensor.layer)).sort((a, b) => a - b);
const isMatrix = (tensor) => tensor.shape.length > 1;
const mapRoles = unique([...layered.filter(isMatrix), ...layered].map((tensor) => tensor.role));
const totalWeights = sum(tensors, "n_weights");

function tipOf(tensor) {
  const kernels = data.kernels[tensor.type];
  const tip = { title: tensor.name, type: `${tensor.type}, ${number(tensor.bpw, 4)} bits per weight` };
  if (kernels) tip.type += `, ${kernels} on CPUs`;
  tip.shape = tensor.shape.join(" × ");
  tip.bytes = `${whole(tensor.n_bytes)} (${percent(tensor.share)} of the file)`;
  if (known(tensor.error)) tip.error = withError(tensor.error, tensor.error_stderr);
  if (known(tensor.sensitivity)) tip.sensitivity = number(tensor.sensitivity);
  if (known(tensor.loss)) tip["error × sensitivity"] = number(tensor.loss);
  if (known(tensor.why)) tip.why = tensor.why;
  return tip;
}

function withError(value, error) {
  return error ? `${number(value)} ± ${number(error, 2)}` : number(value);
}

function groups(rows, key) {
  const found = new Map();
  for (const row of rows) found.set(row[key], [...(found.get(row[key]) ?? []), row]);
  return [...found];
}

const types = unique(tensors.map((tensor) => tensor.type));
