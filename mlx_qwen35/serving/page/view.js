// Messages as elements, which follow them while they grow. Knows what a message holds. Knows nothing of servers.
//
//   user        {role, text, pictures: [data: URL]}
//   assistant   {role, text, reasoning, calls: [{id, name, arguments}], finish, note, thought: seconds, stats}
//   tool        {role, call: id, text}       shown in the block of its call

import { make } from "./inline.js";
import { Rendered, codeBlock } from "./markdown.js";

/** A user's message. actions.edit(message, text): it is to be another one. */
export class Question {
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.element = make("article", { class: "you", "aria-label": "You" });
    this.show();
  }

  show() {
    const { text, pictures = [] } = this.message;
    const edit = button("Edit", () => this.edit());
    this.element.replaceChildren(
      ...(pictures.length ? [make("div", { class: "pictures" }, ...pictures.map(picture))] : []),
      ...(text ? [make("div", { class: "said" }, text)] : []),
      make("div", { class: "row actions" }, edit, ...(text ? [copies(() => text)] : [])),
    );
  }

  edit() {
    const field = make("textarea", { "aria-label": "Your message", rows: "3" });
    field.value = this.message.text;
    const give = () => {
      if (field.value.trim() || this.message.pictures?.length) this.actions.edit(this.message, field.value);
    };
    const leave = () => {
      this.show();
      this.element.querySelector("button").focus();
    };
    field.addEventListener("keydown", (event) => {
      if (event.isComposing) return;
      if (event.key === "Escape") leave();
      else if (event.key === "Enter" && !event.shiftKey) give();
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    const hint = make("span", { class: "small" }, "What follows it is answered anew");
    const pictures = this.element.querySelector(".pictures");
    this.element.replaceChildren(
      ...(pictures ? [pictures] : []),
      field,
      make("div", { class: "row" }, hint, make("span", { class: "space" }), button("Cancel", leave), button("Send", give, "main")),
    );
    field.focus();
    field.setSelectionRange(field.value.length, field.value.length);
  }

  update() {}
}

/** An answer. actions: again(message); results(message, texts): what its tools say; announce(text): read it out. */
export class Answer {
  constructor(message, actions, results = []) {
    this.message = message;
    this.actions = actions;
    this.results = results; // the tool messages behind it
    this.thoughtText = make("div", { class: "pre" });
    this.summary = make("summary", {}, "Thinking");
    this.thought = make("details", { class: "thought", hidden: true }, this.summary, this.thoughtText);
    this.text = make("div", { class: "text" });
    this.calls = make("div", { class: "calls" });
    this.note = make("p", { class: "note", hidden: true });
    this.stats = make("span", { class: "small stats" });
    this.actionRow = make(
      "div",
      { class: "row actions" },
      copies(() => message.text),
      button("Answer again", () => actions.again(message)),
      this.stats,
    );
    const parts = [this.thought, this.text, this.calls, this.note, this.actionRow];
    this.element = make("article", { class: "answer", "aria-label": "Answer" }, ...parts);
    const says = message.finish === null ? actions.announce : () => {};
    this.rendered = new Rendered(this.text, says);
    this.reasoned = 0;
    this.shownCalls = "";
    this.shownText = "";
    this.update();
  }

  /** Shows what the message has now. */
  update() {
    const { message } = this;
    const live = message.finish === null;
    this.element.setAttribute("aria-busy", String(live));
    this.element.classList.toggle("live", live);
    if (message.reasoning.length > this.reasoned) {
      this.thoughtText.append(message.reasoning.slice(this.reasoned));
      this.reasoned = message.reasoning.length;
    }
    this.thought.hidden = !message.reasoning;
    const thinks = live && !message.text && !message.calls.length;
    this.thought.classList.toggle("thinks", thinks);
    const seconds = Math.round(message.thought ?? 0);
    const long = seconds ? ` for ${seconds} s` : "";
    setText(this.summary, thinks ? `Thinking${long}` : `Thought${long || " for a moment"}`);
    if (message.text !== this.shownText || !live) this.rendered.show(message.text, !live);
    this.shownText = message.text;
    this.showCalls(live);
    const waits = live && !message.text && !message.reasoning && !message.calls.length;
    setText(this.note, waits ? "Reading" : (message.note ?? ""));
    this.note.hidden = !this.note.textContent;
    this.note.classList.toggle("wrong", Boolean(message.failed));
    this.note.classList.toggle("waits", waits);
    this.actionRow.hidden = live;
    setText(this.stats, statsText(message.stats));
  }

  showCalls(live) {
    const now = JSON.stringify([this.message.calls, this.results, live]);
    if (now === this.shownCalls) return;
    this.shownCalls = now;
    const { calls } = this.message;
    const asks = !live && calls.length > 0 && this.results.length === 0;
    const fields = [];
    const blocks = calls.map((call) => {
      const block = make(
        "section",
        { class: "call", "aria-label": `Call of ${call.name}` },
        make("h3", {}, "Calls ", make("code", {}, call.name || "a tool")),
        codeBlock(pretty(call.arguments), "arguments"),
      );
      const result = this.results.find((each) => each.call === call.id);
      if (result) block.append(codeBlock(result.text, "result"));
      if (asks) {
        const field = make("textarea", { rows: "2", "aria-label": `What ${call.name} says` });
        field.placeholder = `What ${call.name} says`;
        fields.push(field);
        block.append(field);
      }
      return block;
    });
    const send = () => this.actions.results(this.message, fields.map((field) => field.value));
    this.calls.replaceChildren(...blocks);
    if (asks) this.calls.append(button("Go on with these results", send, "main"));
  }
}

/** Tokens a second, how many, how many of the prompt's were there already. */
export function statsText(stats) {
  if (!stats) return "";
  const number = (value) => value.toLocaleString("en");
  const parts = [];
  if (stats.perSecond) parts.push(`${stats.perSecond.toFixed(stats.perSecond < 10 ? 1 : 0)} tokens/s`);
  if (stats.answer !== undefined) parts.push(`${number(stats.answer)} tokens`);
  if (stats.prompt !== undefined) parts.push(`${number(stats.cached)} of ${number(stats.prompt)} prompt tokens cached`);
  if (stats.first !== undefined) parts.push(`first after ${stats.first.toFixed(1)} s`);
  return parts.join(" \u00b7 ");
}

export function button(text, act, kind = "quiet") {
  const made = make("button", { type: "button", class: kind }, text);
  made.addEventListener("click", act);
  return made;
}

/** A button that copies text() and says so. */
function copies(text) {
  const made = button("Copy", () => copy(text(), made));
  return made;
}

/** Copies a text; the button says how that went. */
export async function copy(text, from) {
  let done = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // a page that came without encryption has no clipboard: the old way
    const field = make("textarea", { class: "unseen", "aria-hidden": "true" });
    field.value = text;
    document.body.append(field);
    field.select();
    done = document.execCommand("copy");
    field.remove();
    from.focus();
  }
  from.textContent = done ? "Copied" : "Cannot copy";
  setTimeout(() => (from.textContent = "Copy"), 1500);
}

function picture(url, at) {
  return make("img", { src: url.startsWith("data:image/") ? url : "", alt: `Picture ${at + 1}`, loading: "lazy" });
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text || "{}"), null, 2);
  } catch {
    return text;
  }
}

function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}
