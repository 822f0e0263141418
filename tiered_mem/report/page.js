"use strict";
// Sorting and filtering of the table of all runs. Without scripts the table is simply all there.
(() => {
  const table = document.getElementById("runs");
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const headers = [...table.tHead.rows[0].cells];
  const filters = [...document.querySelectorAll("select[data-column]")];
  const count = document.getElementById("count");
  const value = (row, column) => row.cells[column].dataset.value ?? row.cells[column].textContent;

  const compare = (a, b, numeric) => {
    if (!numeric) return a.localeCompare(b, undefined, { numeric: true });
    // What has no value comes last in either direction.
    if (a === "" || b === "") return NaN;
    return Number(a) - Number(b);
  };

  const sort = (column) => {
    const header = headers[column];
    const ascending = header.getAttribute("aria-sort") !== "ascending";
    const numeric = header.classList.contains("number");
    headers.forEach((other) => other.hasAttribute("aria-sort") && other.setAttribute("aria-sort", "none"));
    header.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    rows.sort((a, b) => {
      const [x, y] = [value(a, column), value(b, column)];
      const order = compare(x, y, numeric);
      if (Number.isNaN(order)) return (x === "") - (y === "");
      return ascending ? order : -order;
    });
    body.append(...rows);
  };

  const filter = () => {
    let shown = 0;
    for (const row of rows) {
      row.hidden = filters.some((f) => f.value !== "" && row.cells[f.dataset.column].dataset.choice !== f.value);
      shown += !row.hidden;
    }
    count.textContent = `${shown} of ${rows.length} runs`;
  };

  headers.forEach((header, column) => {
    const button = header.querySelector("button");
    if (button) button.addEventListener("click", () => sort(column));
  });
  filters.forEach((select) => select.addEventListener("change", filter));
  document.getElementById("filters").hidden = false;
  filter();
})();
