// What lies nearest to the pointer, in words beside it. Marks have their <title> without this too.
"use strict";
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const REACH = 40; // in units of the chart: marks farther than this are not meant

  const tip = document.createElement("div");
  tip.className = "tip";
  tip.setAttribute("role", "status");
  tip.hidden = true;
  document.body.append(tip);

  const known = new WeakMap();
  let lit = null;

  // Places of a chart, each with its words: points of lines, shapes of bars and scatter marks.
  function placesOf(chart) {
    if (known.has(chart)) return known.get(chart);
    const places = [];
    for (const line of chart.querySelectorAll("polyline[data-at]")) {
      const name = line.querySelector("title").textContent;
      line.dataset.at.split(";").forEach((pair, i) => {
        const { x, y } = line.points.getItem(i);
        const [at, value] = pair.split("|");
        const text = `${name}\n${line.dataset.x} ${at}: ${value}`;
        places.push({ text, left: x, right: x, top: y, bottom: y, reach: Infinity, line });
      });
    }
    for (const shape of chart.querySelectorAll("path.mark, rect.bar")) {
      const { x, y, width, height } = shape.getBBox();
      const text = shape.querySelector("title").textContent.replace(": ", "\n");
      const reach = REACH;
      places.push({ text, left: x, right: x + width, top: y, bottom: y + height, reach, shape });
    }
    known.set(chart, places);
    return places;
  }

  function nearest(places, x, y) {
    let best = null;
    let least = Infinity;
    for (const place of places) {
      const dx = Math.max(place.left - x, 0, x - place.right);
      const dy = Math.max(place.top - y, 0, y - place.bottom);
      const middle = Math.hypot((place.left + place.right) / 2 - x, (place.top + place.bottom) / 2 - y);
      const distance = Math.hypot(dx, dy);
      // Of shapes that overlap under the pointer, the one whose middle is nearest.
      if (distance <= place.reach && distance + middle / 1000 < least) {
        least = distance + middle / 1000;
        best = place;
      }
    }
    return best;
  }

  function show(chart, place) {
    hide();
    const ring = document.createElementNS(SVG, place.line ? "circle" : "rect");
    if (place.line) {
      ring.setAttribute("cx", place.left);
      ring.setAttribute("cy", place.top);
      ring.setAttribute("r", 6);
    } else {
      ring.setAttribute("x", place.left - 2);
      ring.setAttribute("y", place.top - 2);
      ring.setAttribute("width", place.right - place.left + 4);
      ring.setAttribute("height", place.bottom - place.top + 4);
      ring.setAttribute("rx", 3);
    }
    ring.setAttribute("class", "ring");
    (chart.querySelector(".sheet") || chart.lastChild).before(ring);
    const marked = place.line || place.shape;
    marked.classList.add("lit");
    lit = { ring, marked, place };

    tip.textContent = place.text;
    tip.hidden = false;
    settle();
  }

  // Above the mark, or below where there is no room, and never beyond the sides of the window.
  function settle() {
    if (!lit) return;
    const box = lit.ring.getBoundingClientRect();
    const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
    const above = box.top - tip.offsetHeight - 8;
    tip.style.left = `${Math.max(8, Math.min(box.left + box.width / 2 - tip.offsetWidth / 2, room))}px`;
    tip.style.top = `${above > 4 ? above : box.bottom + 8}px`;
  }

  function hide() {
    if (!lit) return;
    lit.ring.remove();
    lit.marked.classList.remove("lit");
    lit = null;
    tip.hidden = true;
  }

  // A clear sheet over the chart takes the pointer, so that the browser does not show a title too.
  function cover(chart) {
    const sheet = document.createElementNS(SVG, "rect");
    sheet.setAttribute("class", "sheet");
    sheet.setAttribute("width", "100%");
    sheet.setAttribute("height", "100%");
    chart.append(sheet);
    chart.tabIndex = 0;
  }

  function follow(chart, event) {
    const matrix = chart.getScreenCTM();
    if (!matrix) return;
    const { x, y } = new DOMPoint(event.clientX, event.clientY).matrixTransform(matrix.inverse());
    const place = nearest(placesOf(chart), x, y);
    if (!place) hide();
    else if (!lit || lit.place !== place) show(chart, place);
  }

  // Left and right go from mark to mark, Escape closes.
  function step(chart, event) {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Escape") hide();
    const places = placesOf(chart);
    if (!move || !places.length) return;
    event.preventDefault();
    const from = lit ? places.indexOf(lit.place) : -1;
    show(chart, places[from < 0 ? 0 : (from + move + places.length) % places.length]);
  }

  for (const chart of document.querySelectorAll("svg.chart")) {
    cover(chart);
    chart.addEventListener("pointermove", (event) => follow(chart, event));
    chart.addEventListener("pointerdown", (event) => follow(chart, event));
    chart.addEventListener("pointerleave", hide);
    chart.addEventListener("keydown", (event) => step(chart, event));
    chart.addEventListener("blur", hide);
  }
  window.addEventListener("scroll", settle, { passive: true });
})();
