// Making elements. Text always becomes text nodes: nothing in this page parses HTML, and the page's
// policy (`require-trusted-types-for 'script'`) has the browser refuse it.

const SVG = "http://www.w3.org/2000/svg";

/** The element with this id. */
export const byId = (id) => document.getElementById(id);

/** An element with properties, attributes (`attrs`), listeners (`onclick`, …) and children. */
export function el(tag, { attrs = {}, ...props } = {}, ...children) {
  const node = Object.assign(document.createElement(tag), props);
  for (const [name, value] of Object.entries(attrs)) {
    if (value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** An SVG element. */
export function svg(tag, attrs = {}, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attrs)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

/** One of the drawings in index.html. */
export function icon(name) {
  return svg("svg", { "aria-hidden": "true" }, svg("use", { href: `#${name}` }));
}

/** A button that shows a drawing and is read as `label`. */
export function iconButton(name, label, onclick) {
  return el("button", { type: "button", title: label, onclick, attrs: { "aria-label": label } }, icon(name));
}

/** Has screen readers say something, once. */
export function announce(text) {
  byId("announcer").textContent = text;
}

/** Shows a line for a while; with an action, long enough to take it. */
export function toast(text, action) {
  const node = el("div", { className: "toast", attrs: { role: "status" } }, el("span", {}, text));
  const timer = setTimeout(() => node.remove(), action ? 8000 : 4000);
  if (action) {
    const onclick = () => {
      clearTimeout(timer);
      node.remove();
      action.run();
    };
    node.append(el("button", { type: "button", onclick }, action.label));
  }
  byId("toasts").append(node);
}

/** Copies text; shows on the button that it did. */
export async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Browsers offer the clipboard to secure origins alone; this older way works everywhere.
    const area = el("textarea", { value: text, className: "visually-hidden" });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  const use = button.querySelector("use");
  const before = use.getAttribute("href");
  use.setAttribute("href", "#i-check");
  setTimeout(() => use.setAttribute("href", before === "#i-check" ? "#i-copy" : before), 1500);
  announce("Copied");
}
