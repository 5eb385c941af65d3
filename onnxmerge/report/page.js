// Pointing at a candidate's mark shows its figures; clicking it, or its row in a table, selects it.
// Candidates go by their numbers; names are only ever copied from element to element as text.
"use strict";
(() => {
  const REACH = 24; // pixels from a mark within which it is pointed at
  const STEPS = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
  const figures = [...document.querySelectorAll(".figures")];
  const chosen = figures.findIndex((block) => !block.hidden); // -1 where none was chosen
  const bar = document.querySelector(".selection");
  const tip = document.querySelector(".tip");
  const buttons = [];
  let pointed = null;

  const numberOf = (element) => Number(element.closest("[data-candidate]").dataset.candidate);

  const select = (number) => {
    figures.forEach((block, n) => {
      block.hidden = n !== number;
    });
    for (const part of document.querySelectorAll(".mark, tr[data-candidate]")) {
      part.classList.toggle("selected", numberOf(part) === number && number !== chosen);
    }
    for (const button of buttons) {
      button.setAttribute("aria-pressed", numberOf(button) === number);
    }
    bar.hidden = number === chosen;
    bar.querySelector("strong").textContent = bar.hidden ? "" : figures[number].dataset.name;
  };

  // Show the figures of the candidate whose dot is pointed at, above it where there is room; null: of none.
  const point = (dot) => {
    if (dot === pointed) {
      return;
    }
    pointed?.closest(".mark").classList.remove("pointed");
    pointed = dot;
    tip.hidden = dot === null;
    if (dot === null) {
      return;
    }
    const at = dot.getBoundingClientRect();
    dot.closest(".mark").classList.add("pointed");
    tip.replaceChildren(...figures[numberOf(dot)].cloneNode(true).childNodes);
    const rightmost = document.documentElement.clientWidth - tip.offsetWidth - 8;
    const left = Math.max(8, Math.min(at.left + at.width / 2 - tip.offsetWidth / 2, rightmost));
    const above = at.top - tip.offsetHeight - 12;
    tip.style.left = `${left + scrollX}px`;
    tip.style.top = `${(above >= 0 ? above : at.bottom + 12) + scrollY}px`;
  };

  const nearest = (plot, event) => {
    let found = null;
    let least = REACH;
    for (const dot of plot.querySelectorAll(".mark use")) {
      const box = dot.getBoundingClientRect();
      const [x, y] = [box.left + box.width / 2, box.top + box.height / 2];
      const distance = Math.hypot(x - event.clientX, y - event.clientY);
      if (distance < least) {
        found = dot;
        least = distance;
      }
    }
    return found;
  };

  // All of them are one stop of the Tab key; arrow keys go from one to the next.
  const oneStop = (elements) => {
    const stop = (at) => elements.forEach((element) => element.setAttribute("tabindex", element === at ? 0 : -1));
    stop(elements.find((element) => numberOf(element) === chosen) ?? elements[0]);
    buttons.push(...elements);
    elements.forEach((element, place) => {
      element.addEventListener("keydown", (event) => {
        if (event.key in STEPS) {
          event.preventDefault();
          const next = elements[(place + STEPS[event.key] + elements.length) % elements.length];
          stop(next);
          next.focus();
        }
      });
    });
  };

  for (const plot of document.querySelectorAll("svg:has(.mark)")) {
    const marks = [...plot.querySelectorAll(".mark")];
    for (const panel of new Set(marks.map((mark) => mark.parentNode))) {
      oneStop(marks.filter((mark) => mark.parentNode === panel));
    }
    for (const dot of plot.querySelectorAll(".mark use")) {
      dot.style.transformOrigin = `${dot.getAttribute("x")}px ${dot.getAttribute("y")}px`; // it grows in its place
    }
    for (const mark of marks) {
      mark.setAttribute("role", "button");
      mark.setAttribute("aria-label", figures[numberOf(mark)].dataset.name);
      mark.addEventListener("focus", () => point([...mark.querySelectorAll("use")].at(-1)));
      mark.addEventListener("blur", () => point(null));
      mark.addEventListener("keydown", (event) => {
        if (event.key === "Enter" || event.key === " ") {
          event.preventDefault();
          select(numberOf(mark));
        }
      });
    }
    plot.addEventListener("pointermove", (event) => {
      const dot = nearest(plot, event);
      plot.style.cursor = dot === null ? "" : "pointer";
      point(dot);
    });
    plot.addEventListener("pointerleave", () => point(null));
    plot.addEventListener("click", (event) => {
      const dot = nearest(plot, event);
      point(null); // what is above may change its height
      if (dot !== null) {
        select(numberOf(dot));
        point(dot);
      }
    });
  }

  for (const body of document.querySelectorAll("tbody:has(> [data-candidate])")) {
    const rows = [...body.querySelectorAll("[data-candidate]")];
    for (const row of rows) {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...row.cells[0].childNodes);
      row.cells[0].append(button);
      row.addEventListener("click", () => select(numberOf(row)));
    }
    oneStop(rows.map((row) => row.querySelector("button")));
  }

  bar.querySelector("button").addEventListener("click", () => select(chosen));
  document.addEventListener("pointerdown", () => point(null));
  document.addEventListener("keydown", (event) => event.key === "Escape" && point(null));
  for (const hint of document.querySelectorAll(".hint")) {
    hint.hidden = hint.parentElement.querySelector("[data-candidate]") === null;
  }
  select(chosen);
})();
