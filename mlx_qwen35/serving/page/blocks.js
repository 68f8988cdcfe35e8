// Lines of Markdown as a model writes it -> blocks: headings, lists, tables, quotes, code, paragraphs.
// Knows text alone: no elements, and nothing of what is inside a line.

const DEEPEST = 12; // lists and quotes inside each other
const FENCE = /^( {0,3})(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?=[ \t]|$)/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])([ \t]+|$)/;
const DELIMITERS = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;

/** Lines -> blocks, each with the source that it was read from. */
export function parse(lines, depth) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    const start = at;
    const block = next();
    if (block) {
      block.source = lines.slice(start, at).join("\n");
      blocks.push(block);
    }
  }
  return blocks;

  function next() {
    const line = lines[at];
    if (!line.trim()) return void at++;
    const fence = FENCE.exec(line);
    if (fence) return code(fence);
    const heading = HEADING.exec(line);
    if (heading) {
      at++;
      return { kind: "heading", level: heading[1].length, text: titled(line.slice(heading[0].length).trim()) };
    }
    if (RULE.test(line)) {
      at++;
      return { kind: "rule" };
    }
    if (depth < DEEPEST && QUOTE.test(line)) return quote();
    if (depth < DEEPEST && item(line, 0)) return list();
    if (isTable(at)) return table();
    const from = at++;
    while (at < lines.length && !interrupts(at)) at++;
    return { kind: "paragraph", text: lines.slice(from, at).map((each) => each.trimStart()).join("\n").trimEnd() };
  }

  /** Whether a paragraph ends before a line. */
  function interrupts(where) {
    const line = lines[where];
    if (!line.trim() || FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line)) return true;
    const found = item(line, 0);
    return Boolean(found && line.slice(found.width).trim() && (!found.ordered || found.first === 1)) || isTable(where);
  }

  function code([, indent, marks, info]) {
    const closing = new RegExp(`^ {0,3}\\${marks[0]}{${marks.length},}[ \\t]*$`);
    const text = [];
    for (at++; at < lines.length; at++) {
      if (closing.test(lines[at])) {
        at++;
        break;
      }
      text.push(lines[at].replace(new RegExp(`^ {0,${indent.length}}`), ""));
    }
    return { kind: "code", language: info.trim().split(/\s+/)[0].slice(0, 40), text: text.join("\n") };
  }

  function quote() {
    const inside = [];
    while (at < lines.length && lines[at].trim()) {
      if (!QUOTE.test(lines[at]) && interrupts(at)) break;
      inside.push(lines[at++].replace(QUOTE, ""));
    }
    return { kind: "quote", blocks: parse(inside, depth + 1) };
  }

  function isTable(where) {
    if (where + 1 >= lines.length || !lines[where].includes("|")) return false;
    const marks = lines[where + 1];
    return marks.includes("-") && DELIMITERS.test(marks) && cells(marks).length === cells(lines[where]).length;
  }

  function table() {
    const head = cells(lines[at]);
    const sides = cells(lines[at + 1]).map((mark) => (mark.endsWith(":") ? (mark.startsWith(":") ? "middle" : "end") : ""));
    const rows = [];
    for (at += 2; at < lines.length && lines[at].trim() && (lines[at].includes("|") || !interrupts(at)); at++) {
      const row = cells(lines[at]).slice(0, head.length);
      while (row.length < head.length) row.push("");
      rows.push(row);
    }
    return { kind: "table", head, sides, rows };
  }

  /** A list and what is inside its items: lines that are indented by two or more go with the item above them. */
  function list() {
    const begin = item(lines[at], 0);
    const block = { kind: "list", ordered: begin.ordered, first: begin.first, loose: false, items: [] };
    let inside = null;
    let width = 0;
    let blank = false;
    for (; at < lines.length; at++) {
      const line = untabbed(lines[at]);
      const found = item(line, begin.indent);
      if (found && found.sign === begin.sign && found.indent < begin.indent + 2 && !RULE.test(line)) {
        if (blank && inside) block.loose = true;
        inside = [line.slice(found.width)];
        width = found.width;
        block.items.push(inside);
      } else if (!line.trim()) {
        inside.push("");
      } else if (indentOf(line) >= begin.indent + 2) {
        if (blank) block.loose = true;
        inside.push(line.slice(Math.min(indentOf(line), width)));
      } else if (blank || interrupts(at)) {
        break;
      } else {
        inside.push(line);
      }
      blank = !line.trim();
    }
    while (!lines[at - 1].trim()) at--; // blank lines behind it are not its own
    block.items = block.items.map((each) => parse(each, depth + 1));
    return block;
  }
}

/** The text of a heading without the #s that may close it. */
function titled(text) {
  let end = text.length;
  while (text[end - 1] === "#") end--;
  return end === 0 || /[ \t]/.test(text[end - 1]) ? text.slice(0, end).trim() : text;
}

/** A line that begins an item of a list whose items are indented by `base`. */
function item(line, base) {
  const found = ITEM.exec(line);
  if (!found || found[1].length > base + (base ? 1 : 3)) return null;
  const ordered = found[2].length > 1;
  const space = found[3].length > 4 ? 1 : found[3].length || 1;
  return {
    ordered,
    indent: found[1].length,
    sign: found[2].at(-1),
    first: ordered ? Number.parseInt(found[2], 10) : 1,
    width: found[1].length + found[2].length + space,
  };
}

function indentOf(line) {
  return line.length - line.trimStart().length;
}

function untabbed(line) {
  return line.replace(/^[ \t]*/, (space) => space.replaceAll("\t", "    "));
}

/** The cells of a table's line; \| and `|` in code are no borders. */
function cells(line) {
  const found = [];
  let cell = "";
  let code = false;
  for (let at = 0; at < line.length; at++) {
    const char = line[at];
    if (char === "\\" && line[at + 1] === "|") cell += line[++at];
    else if (char === "|" && !code) {
      found.push(cell.trim());
      cell = "";
    } else {
      if (char === "`") code = !code && line.includes("`", at + 1);
      cell += char;
    }
  }
  found.push(cell.trim());
  if (found.length > 1 && found[0] === "") found.shift();
  if (found.length > 1 && found.at(-1) === "") found.pop();
  return found;
}
