// Under the pointer, every chart's legend reads the values of that step, not the last ones.
(() => {
  "use strict";
  const holder = document.querySelector("[data-last-step]");
  if (!holder) return;
  const lastStep = Math.max(1, Number(holder.dataset.lastStep));
  const charts = [...holder.querySelectorAll(".chart")].map((figure) => ({
    plot: figure.querySelector(".plot"),
    cursor: figure.querySelector(".cursor"),
    when: figure.querySelector(".when"),
    rows: [...figure.querySelectorAll("[data-steps]")].map((row) => {
      const cell = row.querySelector(".now");
      return { cell, last: cell.textContent, steps: row.dataset.steps.split(" ").map(Number), values: row.dataset.values.split(" ") };
    }),
  }));

  // The last value at or before a step.
  const valueAt = ({ steps, values }, step) => {
    let low = 0;
    let high = steps.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (steps[middle] <= step) low = middle + 1;
      else high = middle;
    }
    return low > 0 ? values[low - 1] : "–";
  };

  const show = (step) => {
    const place = `${(100 * step) / lastStep}%`;
    for (const { cursor, when, rows } of charts) {
      cursor.setAttribute("x1", place);
      cursor.setAttribute("x2", place);
      when.textContent = `at ${step.toLocaleString("en-US")}`;
      for (const row of rows) row.cell.textContent = valueAt(row, step);
    }
    holder.classList.add("reading");
  };

  const reset = () => {
    for (const { when, rows } of charts) {
      when.textContent = "last";
      for (const row of rows) row.cell.textContent = row.last;
    }
    holder.classList.remove("reading");
  };

  for (const { plot } of charts) {
    plot.addEventListener("pointermove", (event) => {
      const box = plot.getBoundingClientRect();
      const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
      show(Math.round(share * lastStep));
    });
    plot.addEventListener("pointerleave", reset);
    plot.addEventListener("pointercancel", reset);
  }
})();
