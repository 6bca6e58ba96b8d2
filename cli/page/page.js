"use strict";
{
  const table = document.getElementById("layers");
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const text = document.getElementById("filter");
  const only = document.getElementById("only");
  const shown = document.getElementById("shown");

  // Unknown numbers have an empty value, and stand last in either order.
  const keyOf = (row, column) => {
    const cell = row.cells[column];
    if (heads[column].classList.contains("text")) return cell.textContent;
    return cell.dataset.v === "" ? null : Number(cell.dataset.v);
  };

  const compare = (a, b) =>
    typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b;

  const sort = (column) => {
    const head = heads[column];
    const before = head.getAttribute("aria-sort");
    // Of numbers the largest come first: they are what is looked for.
    const first = column === 0 || head.classList.contains("text") ? "ascending" : "descending";
    const other = first === "ascending" ? "descending" : "ascending";
    const order = before === first ? other : first;
    const sign = order === "ascending" ? 1 : -1;
    heads.forEach((cell) => cell.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", order);
    const rows = [...body.rows].map((row) => [keyOf(row, column), row]);
    rows.sort(([a], [b]) =>
      a === null || b === null ? (a === null) - (b === null) : sign * compare(a, b));
    body.append(...rows.map(([, row]) => row));
  };

  const filter = () => {
    const wanted = text.value.trim().toLowerCase();
    let left = 0;
    for (const row of body.rows) {
      const words = heads.map((head, at) =>
        head.classList.contains("text") ? row.cells[at].textContent.toLowerCase() : "");
      const kept = words.some((word) => word.includes(wanted)) &&
        (!only.checked || row.classList.contains("marked"));
      row.hidden = !kept;
      left += kept;
    }
    shown.textContent = `${left} of ${body.rows.length} layers`;
  };

  // A link to a layer opens it.
  const open = () => {
    const entry = /^#l\d+$/.test(location.hash) && document.getElementById(location.hash.slice(1));
    if (entry) entry.querySelector("details").open = true;
  };

  heads.forEach((head, column) =>
    head.querySelector("button").addEventListener("click", () => sort(column)));
  text.addEventListener("input", filter);
  only.addEventListener("change", filter);
  addEventListener("hashchange", open);
  document.getElementById("controls").hidden = false;
  // A browser that goes back fills in what was there.
  filter();
  open();
}
