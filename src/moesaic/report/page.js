"use strict";
(() => {
  document.documentElement.classList.add("js");
  const tip = document.getElementById("tip");
  const hide = () => tip.classList.remove("on");
  const show = (event, text) => {
    tip.textContent = text;
    tip.classList.add("on");
    const box = tip.getBoundingClientRect();
    const left = event.clientX + 14 + box.width > innerWidth ? event.clientX - box.width - 10 : event.clientX + 14;
    tip.style.transform = `translate(${Math.max(4, left)}px, ${Math.max(4, event.clientY - box.height - 8)}px)`;
  };

  // layers: one at a time, or all beside each other
  const buttons = [...document.querySelectorAll("button[data-layer]")];
  for (const button of buttons) {
    button.addEventListener("click", () => {
      const wanted = button.dataset.layer;
      for (const other of buttons) other.setAttribute("aria-pressed", String(other === button));
      for (const layer of document.querySelectorAll(".layer"))
        layer.classList.toggle("on", wanted === "" || layer.id === wanted);
      document.querySelector(".maps").classList.toggle("many", wanted === "");
    });
  }

  // heat maps: name the cell under the pointer
  for (const svg of document.querySelectorAll("svg.heat")) {
    const share = JSON.parse(svg.dataset.share);
    const names = svg.closest(".layer").dataset.rows.split("\t");
    const cell = Number(svg.dataset.cell), row = Number(svg.dataset.row);
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const expert = Math.floor((event.clientX - box.left) / cell);
      const line = Math.floor((event.clientY - box.top) / row) - 1;
      const value = share[line]?.[expert];
      if (value === undefined) return hide();
      const fair = (value / 1000) * share[line].length;
      show(event, `${names[line]}, expert ${expert}\n${(value / 10).toFixed(1)} % of its tokens, ${fair.toFixed(2)}× uniform use`);
    });
    svg.addEventListener("pointerleave", hide);
  }

  // curves: read all values at the nearest step
  for (const svg of document.querySelectorAll("svg.lines")) {
    const curves = JSON.parse(svg.dataset.curves);
    const [low, high, start, end] = JSON.parse(svg.dataset.scale);
    const cursor = svg.querySelector(".cursor");
    const near = (xs, at) => xs.reduce((best, x, i) => (Math.abs(x - at) < Math.abs(xs[best] - at) ? i : best), 0);
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const pixel = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
      const at = low + ((pixel - start) / (end - start || 1)) * (high - low);
      const step = curves[0].x[near(curves[0].x, at)];
      const place = start + ((step - low) / (high - low || 1)) * (end - start);
      cursor.setAttribute("x1", place);
      cursor.setAttribute("x2", place);
      const lines = curves.map((c) => `${c.name}  ${Number(c.y[near(c.x, step)].toPrecision(4))}`);
      show(event, [`${svg.dataset.across} ${Math.round(step).toLocaleString("en")}`, ...lines].join("\n"));
    });
    svg.addEventListener("pointerleave", () => {
      hide();
      cursor.setAttribute("x1", -9);
      cursor.setAttribute("x2", -9);
    });
  }
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((d) => (d.open = true)));
})();
