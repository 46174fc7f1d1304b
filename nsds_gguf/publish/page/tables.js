// Tables: what they show, sorting and filtering.

// columns: {title, value(row), show(row) -> text or node, text: left-aligned, head: names the row,
// wrap: may take several lines}
function table(target, columns, rows) {
  const heads = columns.map(({ title, text }) => el("th", { scope: "col", className: text ? "" : "number" }, title));
  const body = el("tbody", {}, ...rows.map((row) => tableRow(columns, row)));
  target.replaceChildren(el("table", {}, el("thead", {}, el("tr", {}, ...heads)), body));
  return { heads, body };
}

// A table whose heads are buttons that sort it: numbers largest first, text from A, the other way on a second press.
function sortableTable(target, columns, rows) {
  const { heads, body } = table(target, columns, rows);
  heads.forEach((head, i) => {
    const button = el("button", { type: "button" }, columns[i].title);
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const descending = head.ariaSort ? head.ariaSort === "ascending" : !columns[i].text;
      for (const other of heads) other.removeAttribute("aria-sort");
      head.ariaSort = descending ? "descending" : "ascending";
      body.append(...ordered([...body.rows], (row) => columns[i].value(row.record), descending));
    });
  });
  return body;
}

function tableRow(columns, row) {
  const cells = columns.map((column) => {
    const cell = el(column.head ? "th" : "td", {}, column.show ? column.show(row) : String(column.value(row)));
    if (column.head) cell.scope = "row";
    if (!column.text) cell.className = "number";
    if (column.wrap) cell.className = "wrap";
    return cell;
  });
  return Object.assign(el("tr", {}, ...cells), { record: row });
}

function ordered(rows, value, descending) {
  const compare = (a, b) => (typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b);
  const present = rows.filter((row) => known(value(row)));
  const sorted = present.sort((a, b) => compare(value(a), value(b)) * (descending ? -1 : 1));
  return [...sorted, ...rows.filter((row) => !known(value(row)))];
}

const chip = (tensor) => {
  const node = el("span", { className: "chip" });
  node.style.background = tensor.plain ? "var(--plain)" : `var(--type-${types.indexOf(tensor.type)})`;
  return el("span", {}, node, tensor.type);
};

function groupColumns(title, name) {
  return [
    { title, value: (row) => row.name, show: name, text: true, head: true },
    { title: "bits per weight", value: (row) => row.bpw, show: (row) => fixed(row.bpw, 3) },
    { title: "of the file", value: (row) => row.n_bytes, show: (row) => percent(row.n_bytes / data.file_bytes) },
    { title: "bytes", value: (row) => row.n_bytes, show: (row) => whole(row.n_bytes) },
    {
      title: "of the weights",
      value: (row) => row.n_weights,
      show: (row) => percent(row.n_weights / (totalWeights || 1)),
    },
    { title: "tensors", value: (row) => row.count },
  ];
}

function groupRows(key) {
  const rows = groups(tensors, key).map(([name, members]) => {
    const [n_bytes, n_weights] = [sum(members, "n_bytes"), sum(members, "n_weights")];
    return {
      name,
      first: members[0],
      count: members.length,
      n_bytes,
      n_weights,
      bpw: n_weights ? (n_bytes * 8) / n_weights : 0,
    };
  });
  return rows.sort((a, b) => b.n_bytes - a.n_bytes);
}

function tensorColumns() {
  const measured = [
    { title: "error", value: (t) => t.error, show: (t) => withError(t.error, t.error_stderr) },
    { title: "sensitivity", value: (t) => t.sensitivity, show: (t) => number(t.sensitivity) },
    { title: "error × sensitivity", value: (t) => t.loss, show: (t) => number(t.loss) },
    { title: "rows measured", value: (t) => t.n_rows_sampled, show: (t) => whole(t.n_rows_sampled) },
    { title: "why", value: (t) => t.why, text: true },
  ];
  return [
    { title: "tensor", value: (t) => t.name, text: true, head: true },
    { title: "type", value: (t) => t.type, show: chip, text: true },
    { title: "bits per weight", value: (t) => t.bpw, show: (t) => fixed(t.bpw, 3) },
    { title: "bytes", value: (t) => t.n_bytes, show: (t) => whole(t.n_bytes) },
    { title: "of the file", value: (t) => t.share, show: (t) => percent(t.share) },
    ...(isPlan ? measured : []),
    { title: "shape", value: (t) => t.n_weights, show: (t) => t.shape.join(" × ") },
    { title: "role", value: (t) => t.role, text: true },
    { title: "layer", value: (t) => t.layer, show: (t) => (known(t.layer) ? String(t.layer) : "–") },
  ];
}
