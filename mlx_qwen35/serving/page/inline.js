// What is inside a line or paragraph -> nodes: emphasis, code, links, line ends. Text becomes text nodes and nothing
// else: no HTML is read, no picture is fetched, and a link is one only if it leads to http or https.

const MOST_INLINE = 50_000; // characters of one paragraph that are looked at for emphasis and links
const MOST_MARKS = 500; // runs of * _ ~ in one paragraph
const MOST_LABEL = 600; // characters between [ and ]
const MOST_FAILURES = 200; // brackets that are no link, after which none is looked for
const LINK_END = /\]\(\s*(<[^<>\n]*>|[^\s()<>]*(?:\([^\s()<>]*\)[^\s()<>]*)*)(?:\s+(?:"[^"]*"|'[^']*'))?\s*\)/y;
const ADDRESS = /https?:\/\/[^\s<>"'`\\]{1,2000}/y;
const MATH = /\\\([\s\S]{1,2000}?\\\)|\\\[[\s\S]{1,2000}?\\\]|\$\$[^$]{1,2000}\$\$/y;
const SPECIAL = /[\\`*_~[!<$\n]|https?:\/\//g;
const PUNCTUATION = /[\p{P}\p{S}]/u;

/** An element with attributes and children. */
export function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === true) element.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

/** The element, with text in it as paragraphs have it. */
export function withText(element, text, depth = 0) {
  if (text.length > MOST_INLINE || depth > 4) element.append(text);
  else element.append(...emphasised(pieces(text, depth)));
  return element;
}

/** Text -> nodes and marks that may begin or end emphasis. */
function pieces(text, depth) {
  const found = [];
  let plain = "";
  let failures = 0;
  let at = 0;
  const flush = () => {
    if (plain) found.push(document.createTextNode(plain));
    plain = "";
  };
  const add = (node, end) => {
    flush();
    found.push(node);
    at = end;
  };
  const matches = (pattern, where) => {
    pattern.lastIndex = where;
    return pattern.exec(text);
  };
  while (at < text.length) {
    SPECIAL.lastIndex = at;
    const stop = SPECIAL.exec(text)?.index ?? text.length;
    plain += text.slice(at, stop);
    at = stop;
    if (at >= text.length) break;
    const char = text[at];
    const math = (char === "\\" || char === "$") && matches(MATH, at);
    if (math) {
      add(make("span", { class: "math" }, math[0]), at + math[0].length);
    } else if (char === "\n") {
      plain = plain.trimEnd();
      add(make("br"), at + 1);
    } else if (char === "\\" && text[at + 1] === "\n") {
      add(make("br"), at + 2);
    } else if (char === "\\" && at + 1 < text.length && PUNCTUATION.test(text[at + 1]) && !"()[]".includes(text[at + 1])) {
      plain += text[at + 1];
      at += 2;
    } else if (char === "`") {
      const marks = /`+/y;
      marks.lastIndex = at;
      const [run] = marks.exec(text);
      const end = closing(text, run, at + run.length);
      if (end < 0) {
        plain += run;
        at += run.length;
      } else {
        const inside = text.slice(at + run.length, end).replaceAll("\n", " ");
        const bare = inside.trim() && inside.startsWith(" ") && inside.endsWith(" ") ? inside.slice(1, -1) : inside;
        add(make("code", {}, bare), end + run.length);
      }
    } else if (char === "[" || (char === "!" && text[at + 1] === "[")) {
      const begin = char === "!" ? at + 1 : at;
      const link = failures < MOST_FAILURES ? linkAt(text, begin, matches, depth) : null;
      if (link) add(link.node, link.end);
      else {
        failures++;
        plain += text.slice(at, begin + 1);
        at = begin + 1;
      }
    } else if (char === "h" || char === "<") {
      const begin = char === "<" ? at + 1 : at;
      const address = /\w/.test(text[at - 1] ?? "") ? null : matches(ADDRESS, begin);
      const url = address && (char === "<" ? address[0] : trimmed(address[0]));
      const end = begin + (url?.length ?? 0);
      const node = url && (char !== "<" || text[end] === ">") ? anchor(url, [url]) : null;
      if (node) add(node, end + (char === "<" ? 1 : 0));
      else plain += text[at++];
    } else if (char === "*" || char === "_" || char === "~") {
      let end = at;
      while (text[end] === char) end++;
      const mark = marked(text, at, end);
      if (mark) add(mark, end);
      else {
        plain += text.slice(at, end);
        at = end;
      }
    } else {
      plain += text[at++];
    }
  }
  flush();
  return found;
}

/** Where a run of backticks that is exactly `run` begins, from `at` on; -1 if none does. */
function closing(text, run, at) {
  for (let from = text.indexOf(run, at); from >= 0; from = text.indexOf(run, from)) {
    let end = from;
    while (text[end] === "`") end++;
    if (end - from === run.length) return from;
    from = end;
  }
  return -1;
}

/** [label](address) at `at`; what a picture would be is a link to it. */
function linkAt(text, at, matches, depth) {
  let open = 0;
  for (let end = at; end < text.length && end - at < MOST_LABEL; end++) {
    if (text[end] === "\\") end++;
    else if (text[end] === "[") open++;
    else if (text[end] === "]" && --open === 0) {
      const found = matches(LINK_END, end);
      if (!found) return null;
      const address = found[1].replace(/^<|>$/g, "");
      const label = text.slice(at + 1, end);
      const node = anchor(address, withText(make("span"), label || address, depth + 1).childNodes);
      return node && { node, end: end + found[0].length };
    }
  }
  return null;
}

/** A link, or null where it would lead anywhere but to the web. */
function anchor(address, children) {
  let url;
  try {
    url = new URL(address);
  } catch {
    return null;
  }
  if (url.protocol !== "http:" && url.protocol !== "https:") return null;
  const link = make("a", { href: url.href, rel: "noopener noreferrer nofollow", target: "_blank", title: url.href });
  link.append(...children);
  for (const inner of link.querySelectorAll("a")) inner.replaceWith(...inner.childNodes);
  return link;
}

/** An address in running text ends before the punctuation of its sentence. */
function trimmed(address) {
  let end = address.replace(/[.,;:!?*_~\]}]+$/, "");
  while (end.endsWith(")") && end.split(")").length > end.split("(").length) end = end.slice(0, -1).replace(/[.,;:!?]+$/, "");
  return end;
}

/** A run of * _ or ~ that may begin or end emphasis, or null. */
function marked(text, at, end) {
  const before = text[at - 1] ?? " ";
  const after = text[end] ?? " ";
  const opensAtAll = !/\s/.test(after) && (!PUNCTUATION.test(after) || /\s/.test(before) || PUNCTUATION.test(before));
  const closesAtAll = !/\s/.test(before) && (!PUNCTUATION.test(before) || /\s/.test(after) || PUNCTUATION.test(after));
  const char = text[at];
  const word = char === "_";
  const opens = opensAtAll && (!word || !closesAtAll || PUNCTUATION.test(before));
  const closes = closesAtAll && (!word || !opensAtAll || PUNCTUATION.test(after));
  if ((!opens && !closes) || (char === "~" && end - at > 2)) return null;
  return { char, count: end - at, length: end - at, opens, closes };
}

/** Pieces with their marks -> nodes, as CommonMark pairs marks. */
function emphasised(found) {
  const marks = found.filter((each) => !(each instanceof Node));
  if (marks.length <= MOST_MARKS) for (let at = 0; at < found.length; at++) at = paired(found, at);
  return found.map((each) => (each instanceof Node ? each : each.char.repeat(each.count)));
}

/** Pairs the mark at `at` with openers before it; where to go on. */
function paired(found, at) {
  const closer = found[at];
  if (closer instanceof Node || !closer.closes) return at;
  for (let from = at - 1; from >= 0 && closer.count > 0; from--) {
    const opener = found[from];
    if (opener instanceof Node || !opener.opens || opener.char !== closer.char || opener.count === 0) continue;
    const both = opener.closes || closer.opens;
    if (both && (opener.length + closer.length) % 3 === 0 && (opener.length % 3 || closer.length % 3)) continue;
    if (closer.char === "~" && opener.count !== closer.count) continue;
    const count = closer.char === "~" ? closer.count : opener.count > 1 && closer.count > 1 ? 2 : 1;
    const name = closer.char === "~" ? "del" : count === 2 ? "strong" : "em";
    const inside = found.slice(from + 1, at).map((each) => (each instanceof Node ? each : each.char.repeat(each.count)));
    found.splice(from + 1, at - from - 1, make(name, {}, ...inside));
    at = from + 2;
    opener.count -= count;
    closer.count -= count;
    if (opener.count > 0) from++;
  }
  return at;
}
