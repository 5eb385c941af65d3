// Measures the pages in this document's frames, points and clicks in them, and writes what it finds into #findings.
"use strict";
const LEAST_CONTRAST = 4.5;

const shown = (element) => element.checkVisibility({ visibilityProperty: true });
const boxOf = ({ left, top, right, bottom }) => ({ left, top, right, bottom });

// Every section and figure that is shown: its heading, and the box of what stands under the heading.
function parts(page) {
  const found = [];
  for (const part of page.querySelectorAll("section:has(> h2), figure:has(> h3), .figures")) {
    if (shown(part)) {
      const heading = part.querySelector("h2, h3");
      const box = boxOf((part.querySelector(":scope > .scroll > svg") ?? part).getBoundingClientRect());
      box.top = Math.max(box.top, heading.getBoundingClientRect().bottom + 2);
      found.push({ heading: heading.textContent, box });
    }
  }
  return found;
}

// What reaches beyond the window, unless its own box scrolls.
function tooWide(page) {
  const width = page.defaultView.innerWidth;
  const found = page.documentElement.scrollWidth > width ? [`page: ${page.documentElement.scrollWidth}`] : [];
  for (const element of page.body.querySelectorAll("*")) {
    const box = element.getBoundingClientRect();
    if (shown(element) && !element.closest(".scroll > *") && (box.right > width + 0.5 || box.left < -0.5)) {
      found.push(`${element.tagName}.${element.className}: ${box.left} to ${box.right}`);
    }
  }
  return found;
}

const numbers = (color) => {
  const [red, green, blue, alpha = 1] = color.match(/[\d.]+/g).map(Number);
  return [red, green, blue, alpha];
};
const over = (upper, lower) => upper.slice(0, 3).map((part, n) => part * upper[3] + lower[n] * (1 - upper[3]));
const luminance = (color) => {
  const [red, green, blue] = color.slice(0, 3).map((part) => {
    const level = part / 255;
    return level <= 0.04045 ? level / 12.92 : ((level + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
};
const contrast = (a, b) => {
  const [dark, light] = [luminance(a), luminance(b)].sort((x, y) => x - y);
  return (light + 0.05) / (dark + 0.05);
};

// The colour that an element paints under a text, with its opacity; null where it paints none.
function painted(view, element) {
  const style = view.getComputedStyle(element);
  const drawn = element instanceof view.SVGGeometryElement || element instanceof view.SVGUseElement;
  const color = drawn ? style.fill : style.backgroundColor;
  if (color === "none") {
    return null;
  }
  const [red, green, blue, alpha] = numbers(color);
  const opacity = alpha * Number(style.opacity) * (drawn ? Number(style.fillOpacity) : 1);
  return opacity === 0 ? null : [red, green, blue, opacity];
}

// Texts that something covers, and texts too pale for what is behind them.
function texts(page) {
  const view = page.defaultView;
  const found = { covered: [], pale: [], number: 0, least: 99 };
  const walker = page.createTreeWalker(page.body, view.NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const owner = walker.currentNode.parentElement;
    const text = walker.currentNode.data.trim();
    if (!text || owner.closest("script, style") || !shown(owner)) {
      continue;
    }
    found.number += 1;
    const range = page.createRange();
    range.selectNodeContents(walker.currentNode);
    const stackAtText = () => {
      const box = range.getClientRects()[0];
      return box ? page.elementsFromPoint(box.left + box.width / 2, box.top + box.height / 2) : [];
    };
    const isCovered = () => {
      const above = stack.slice(0, stack.indexOf(owner));
      return !stack.includes(owner) || above.some((upper) => !owner.contains(upper) && painted(view, upper));
    };
    let stack = stackAtText();
    const scrolling = owner.closest(".scroll");
    if (isCovered() && scrolling) {
      const [box, window] = [range.getBoundingClientRect(), scrolling.getBoundingClientRect()];
      scrolling.scrollLeft += (box.left + box.right - window.left - window.right) / 2;
      stack = stackAtText();
    }
    if (isCovered()) {
      found.covered.push(text);
      continue;
    }
    const below = stack.slice(stack.indexOf(owner) + (owner.closest("svg") ? 1 : 0));
    const layers = below.map((element) => painted(view, element)).filter((layer) => layer !== null);
    const canvas = view.matchMedia("(prefers-color-scheme: dark)").matches ? [0, 0, 0] : [255, 255, 255];
    const behind = layers.reduceRight((lower, upper) => over(upper, lower), canvas);
    const style = view.getComputedStyle(owner);
    const color = numbers(owner.closest("svg") ? style.fill : style.color);
    for (let up = owner; up; up = up.parentElement) {
      color[3] *= Number(view.getComputedStyle(up).opacity);
    }
    const ratio = contrast(over(color, behind), behind);
    found.least = Math.min(found.least, ratio);
    if (ratio < LEAST_CONTRAST) {
      found.pale.push(`${text}: ${ratio.toFixed(2)}`);
    }
  }
  for (const box of page.querySelectorAll(".scroll")) {
    box.scrollLeft = 0;
  }
  return found;
}

// Labels of a plot that lie on each other, or are cut off at its edge. A fifth of a line's height is air.
function labels(page) {
  const found = { overlapping: [], cut: [], number: 0 };
  for (const plot of page.querySelectorAll("figure svg")) {
    const edge = plot.getBoundingClientRect();
    const all = [...plot.querySelectorAll("text")].map((label) => ({ label, box: label.getBoundingClientRect() }));
    found.number += all.length;
    all.forEach(({ label, box }, n) => {
      if (box.left < edge.left - 1 || box.right > edge.right + 1 || box.top < edge.top - 1 || box.bottom > edge.bottom + 1) {
        found.cut.push(label.textContent);
      }
      for (const { label: other, box: taken } of all.slice(n + 1)) {
        const air = 0.2 * Math.min(box.height, taken.height);
        const across = Math.min(box.right, taken.right) - Math.max(box.left, taken.left);
        const down = Math.min(box.bottom, taken.bottom) - Math.max(box.top, taken.top);
        if (across > 1 && down > 2 * air) {
          found.overlapping.push(`${label.textContent} / ${other.textContent}`);
        }
      }
    });
  }
  return found;
}

// What a reader sees of a selection.
function state(page) {
  const texts = (selector) => [...page.querySelectorAll(selector)].filter(shown).map((element) => element.textContent.trim());
  return {
    figures: texts(".figures > h2"),
    values: [...page.querySelectorAll(".figures .value")].filter(shown).map((element) => element.textContent),
    rows: texts("tr.selected > td:first-child"),
    marks: [...new Set([...page.querySelectorAll(".mark.selected")].map((mark) => mark.getAttribute("aria-label")))],
    pressed: page.querySelectorAll("[aria-pressed=true]").length,
    bar: texts(".selection").join(" ").replace(/\s+/g, " "),
    tip: texts(".tip").join(" ").replace(/\s+/g, " "),
  };
}

// Points, clicks and types; what a reader sees after each step. `number` is the candidate to select.
function behaviour(page, number) {
  const view = page.defaultView;
  const seen = { begin: state(page) };
  const row = page.querySelectorAll(`tr[data-candidate="${number}"] > td:last-child`)[0];
  const dot = page.querySelector(`.mark[data-candidate="${number}"] use`);
  const at = (x, y, kind, type) => {
    const target = page.elementFromPoint(x, y);
    target.dispatchEvent(new type(kind, { bubbles: true, cancelable: true, clientX: x, clientY: y, view }));
  };
  const middle = (element) => {
    const box = element.getBoundingClientRect();
    return [box.left + box.width / 2, box.top + box.height / 2];
  };
  const key = (name) => page.activeElement.dispatchEvent(new view.KeyboardEvent("keydown", { key: name, bubbles: true, cancelable: true }));
  const back = () => {
    const button = page.querySelector(".selection button");
    button.dispatchEvent(new view.PointerEvent("pointerdown", { bubbles: true }));
    button.click();
  };
  const click = (element) => at(...middle(element), "click", view.MouseEvent);

  if (dot) {
    const [x, y] = middle(dot);
    at(x + 6, y + 6, "pointermove", view.PointerEvent);
    seen.pointed = state(page);
    seen.pointedWide = tooWide(page);
    page.querySelector(".tip").style.pointerEvents = "auto";
    seen.pointedTexts = texts(page).pale;
    page.querySelector(".tip").style.pointerEvents = "";
    const strayed = () => Math.hypot(middle(dot)[0] - x, middle(dot)[1] - y);
    seen.strayed = [strayed()];
    at(1, 1, "pointerdown", view.PointerEvent);
    seen.left = state(page);
    at(x, y, "click", view.MouseEvent);
    seen.clicked = state(page);
    at(1, 1, "pointerdown", view.PointerEvent);
    seen.strayed.push(strayed());
    back();
    seen.back = state(page);
    const marks = [...dot.closest("svg").querySelectorAll(".mark")];
    const panel = marks.filter((mark) => mark.parentNode === dot.closest(".mark").parentNode);
    seen.stops = panel.filter((mark) => mark.tabIndex === 0).length;
    panel.find((mark) => mark.tabIndex === 0)?.focus();
    seen.focused = state(page);
    for (let steps = 0; steps < panel.length && page.activeElement !== dot.closest(".mark"); steps += 1) {
      key("ArrowRight");
    }
    key("Enter");
    seen.entered = state(page);
    key("Escape");
    seen.escaped = state(page);
    back();
  }
  row.scrollIntoView({ inline: "center", block: "nearest" });
  click(row);
  seen.row = state(page);
  const measured = { ...texts(page), wide: tooWide(page) };
  seen.rowTexts = [...measured.pale, ...measured.covered, ...measured.wide];
  back();
  const button = page.querySelector(`tr[data-candidate="${number}"] button`);
  const buttons = [...(button?.closest("tbody").querySelectorAll("button") ?? [])];
  seen.rowStops = buttons.filter((other) => other.tabIndex === 0).length;
  button?.focus();
  seen.buttonFocused = page.activeElement === button;
  button?.click();
  seen.button = state(page);
  back();
  page.activeElement.blur();
  for (const box of page.querySelectorAll(".scroll")) {
    box.scrollLeft = 0;
  }
  seen.end = state(page);
  return seen;
}

addEventListener("load", () => {
  const findings = {};
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument;
    page.querySelectorAll("details").forEach((element) => (element.open = true));
    const height = () => Math.ceil(page.querySelector("main").getBoundingClientRect().bottom);
    frame.style.height = `${height() + 400}px`; // room for a selection's bar
    findings[frame.name] = {
      width: page.defaultView.innerWidth,
      dark: page.defaultView.matchMedia("(prefers-color-scheme: dark)").matches,
      fetched: page.defaultView.performance.getEntriesByType("resource").map((entry) => entry.name),
      wide: tooWide(page),
      texts: texts(page),
      labels: labels(page),
      seen: page.querySelector(".selection") ? behaviour(page, Number(frame.dataset.select)) : null,
      parts: parts(page),
    };
    frame.style.height = `${height()}px`;
  }
  for (const frame of document.querySelectorAll("iframe")) {
    const { left, top } = frame.getBoundingClientRect();
    Object.assign(findings[frame.name], { left, top });
  }
  document.querySelector("#findings").textContent = JSON.stringify({ tall: document.documentElement.scrollHeight, pages: findings });
});
