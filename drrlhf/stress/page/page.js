// Tables sort by a click on a header. Each item of a table is a <tbody>, so that what belongs to a
// row (its examples) moves with it. Without this script the tables stay in the order of the report.
"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const headers = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
  headers.forEach((header, column) => {
    if (header.dataset.unsorted !== undefined) return;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    header.append(button);
    button.addEventListener("click", () => sort(table, headers, column));
  });
}

// On paper the worst findings have their examples; those of every change would fill a book.
addEventListener("beforeprint", () => {
  for (const one of document.querySelectorAll(".findings details")) one.open = true;
});

function sort(table, headers, column) {
  const numbers = headers[column].classList.contains("n");
  const before = headers[column].getAttribute("aria-sort");
  // Numbers begin with the largest, words with the first.
  const first = numbers ? "descending" : "ascending";
  const other = numbers ? "ascending" : "descending";
  const order = before === first ? other : first;
  const sign = order === "ascending" ? 1 : -1;
  const key = (body) => {
    const cell = body.rows[0].cells[column];
    return numbers ? cell.dataset.v : cell.textContent.trim();
  };
  const compare = (a, b) => {
    // What has no number comes last in either order.
    if (a === "" || b === "") return (a === "") - (b === "");
    return sign * (numbers ? a - b : a.localeCompare(b));
  };
  const bodies = [...table.tBodies].sort((a, b) => compare(key(a), key(b)));
  for (const header of headers) header.removeAttribute("aria-sort");
  headers[column].setAttribute("aria-sort", order);
  table.append(...bodies);
}
