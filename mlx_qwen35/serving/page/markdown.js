// Markdown as a model writes it, shown while it grows. Knows blocks and their elements; inline.js knows what is inside.

import { parse } from "./blocks.js";
import { make, withText } from "./inline.js";

/** Shows text in an element, again and again as it grows: what did not change stays where it is.
 *  finished(text): called once for each block that will not change any more, in order. */
export class Rendered {
  constructor(into, finished = () => {}) {
    this.into = into;
    this.finished = finished;
    this.blocks = [];
    this.nodes = [];
    this.told = 0;
  }

  show(text, whole = false) {
    const blocks = parse(text.split(/\r\n?|\n/), 0);
    let same = 0;
    while (same < blocks.length && same < this.blocks.length && blocks[same].source === this.blocks[same].source) same++;
    const grown = same === this.blocks.length - 1 && same < blocks.length && this.grow(this.blocks[same], blocks[same]);
    const from = same + (grown ? 1 : 0);
    for (const node of this.nodes.splice(from)) node.remove();
    for (const block of blocks.slice(from)) {
      const node = build(block);
      this.nodes.push(node);
      this.into.append(node);
    }
    this.blocks = blocks;
    for (; this.told < (whole ? blocks.length : blocks.length - 1); this.told++) this.finished(this.nodes[this.told].textContent);
  }

  /** A code block that only got longer keeps its element; whether it did. */
  grow(before, now) {
    if (before.kind !== "code" || now.kind !== "code" || before.language !== now.language) return false;
    if (!now.text.startsWith(before.text)) return false;
    this.nodes.at(-1).querySelector("code").append(now.text.slice(before.text.length));
    return true;
  }
}

function build(block) {
  switch (block.kind) {
    case "code":
      return codeBlock(block.text, block.language);
    case "heading":
      return withText(make(`h${Math.min(6, block.level + 2)}`), block.text);
    case "rule":
      return make("hr");
    case "quote":
      return make("blockquote", {}, ...block.blocks.map(build));
    case "list":
      return buildList(block);
    case "table":
      return buildTable(block);
    default:
      return withText(make("p"), block.text);
  }
}

/** Code with its language and a button that copies it. */
export function codeBlock(text, language) {
  const copy = make("button", { type: "button", class: "quiet copy", "data-copies": "code" }, "Copy");
  return make(
    "figure",
    { class: "code" },
    make("figcaption", {}, make("span", {}, language || "text"), copy),
    make("pre", { tabindex: "0", "aria-label": `Code, ${language || "text"}` }, make("code", {}, text)),
  );
}

function buildList(block) {
  const made = make(block.ordered ? "ol" : "ul", block.ordered && block.first !== 1 ? { start: block.first } : {});
  for (const blocks of block.items) {
    const [first] = blocks;
    const task = first?.kind === "paragraph" && /^\[([ xX])\][ \n]/.exec(first.text);
    if (task) first.text = (task[1] === " " ? "\u2610 " : "\u2611 ") + first.text.slice(4);
    const entry = make("li", task ? { class: "task" } : {});
    for (const each of blocks) {
      if (each.kind === "paragraph" && !block.loose) withText(entry, each.text);
      else entry.append(build(each));
    }
    made.append(entry);
  }
  return made;
}

function buildTable(block) {
  const row = (name, texts) =>
    make("tr", {}, ...texts.map((text, at) => withText(make(name, { class: block.sides[at] || null }), text)));
  const body = make("tbody", {}, ...block.rows.map((texts) => row("td", texts)));
  const table = make("table", {}, make("thead", {}, row("th", block.head)), body);
  return make("div", { class: "wide", tabindex: "0", role: "region", "aria-label": "Table" }, table);
}
