"use strict";
for (const figure of document.querySelectorAll(".mask")) {
  const svg = figure.querySelector("svg");
  const cursor = figure.querySelector(".cursor");
  const tip = figure.querySelector(".tip");
  const mask = JSON.parse(figure.querySelector("script").textContent);
  const rows = mask.live.map((runs) => {
    const row = [];
    for (let i = 0; i < runs.length; i += 2) for (let j = 0; j < runs[i]; j++) row.push(runs[i + 1]);
    return row;
  });
  const written = (number) => number.toLocaleString("en-US");
  const span = (one, many, first, last) =>
    first === last ? `${one} ${written(first)}` : `${many} ${written(first)}–${written(last)}`;

  const said = (row, column) => {
    const q = row * mask.queries, k = column * mask.keys;
    const height = Math.min(mask.queries, mask.nq - q), width = Math.min(mask.keys, mask.n - k);
    const queries = span("query", "queries", mask.first + q, mask.first + q + height - 1);
    const keys = span("key", "keys", k, k + width - 1);
    const live = rows[row][column], pairs = height * width;
    const share = pairs === 1 ? (live ? "live" : "not live") : `${written(live)} of ${written(pairs)} pairs live`;
    return `${queries}, ${keys}:\n${share}`;
  };

  let at = null;
  const hide = () => {
    at = null;
    cursor.toggleAttribute("hidden", true);
    tip.hidden = true;
  };
  const show = (row, column) => {
    row = Math.max(0, Math.min(rows.length - 1, row));
    column = Math.max(0, Math.min(mask.columns - 1, column));
    if (at && at[0] === row && at[1] === column) return;
    at = [row, column];
    cursor.toggleAttribute("hidden", false);
    cursor.setAttribute("x", column);
    cursor.setAttribute("y", row);
    tip.hidden = false;
    tip.textContent = said(row, column);
    const box = svg.getBoundingClientRect();
    const cellWidth = box.width / mask.columns, cellHeight = box.height / rows.length;
    const middle = (column + 0.5) * cellWidth - tip.offsetWidth / 2;
    tip.style.left = `${Math.max(0, Math.min(box.width - tip.offsetWidth, middle))}px`;
    const above = row * cellHeight - tip.offsetHeight - 8;
    const fits = box.top + above >= 0;
    tip.style.top = `${fits ? above : (row + 1) * cellHeight + 8}px`;
  };
  const point = (event) => {
    const box = svg.getBoundingClientRect();
    show(
      Math.floor(((event.clientY - box.top) / box.height) * rows.length),
      Math.floor(((event.clientX - box.left) / box.width) * mask.columns),
    );
  };

  const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  svg.addEventListener("pointermove", point);
  svg.addEventListener("pointerdown", point);
  svg.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && hide());
  svg.addEventListener("blur", hide);
  svg.addEventListener("focus", () => svg.matches(":focus-visible") && show(...(at || [0, 0])));
  svg.addEventListener("keydown", (event) => {
    if (event.key === "Escape") return hide();
    const step = steps[event.key];
    if (!step) return;
    event.preventDefault();
    const [row, column] = at || [0, 0];
    show(row + step[0], column + step[1]);
  });
}
