// The page: conversations, the one that is shown, and the answers that are being made for any of them.

import { $, closeSide, isNearEnd, openSide, showDown, sure, tell, toEnd } from "./around.js";
import { make } from "./inline.js";
import { MOST, Talks, empty, readKey, readSettings, writeKey, writeSettings } from "./keep.js";
import * as pictures from "./pictures.js";
import { ServerError, answer, bodyOf, models, toolsOf } from "./talk.js";
import { Answer, Question, button, copy } from "./view.js";

const FIELDS = ["system", "thinking", "temperature", "top_p", "top_k", "max_tokens", "tools"];
const SAVE_EVERY = 2000; // ms while an answer grows

const settings = readSettings();
const running = new Map(); // id of a conversation -> {controller, message}
const views = new Map(); // message -> its view, of the conversation that is shown
let talks;
let talk = empty();
let key = readKey();
let chosen = []; // data: URLs of pictures to send
let frame = 0;

// ---- a conversation ----

/** Shows a conversation, or a new one where there is none of that id. */
async function open(id) {
  const found = running.get(id)?.talk ?? (id ? await talks.read(id) : null);
  talk = found ?? empty();
  for (const message of talk.messages) {
    if (message.role === "assistant" && message.finish === null && !running.has(talk.id)) end(message, "The page was left before the answer had ended");
  }
  history.replaceState(null, "", found ? `#${talk.id}` : location.pathname);
  draw();
  list();
  closeSide();
  toEnd();
  $("field").focus();
}

function draw() {
  views.clear();
  $("announcer").replaceChildren();
  const shown = talk.messages.filter((message) => message.role !== "tool");
  $("messages").replaceChildren(...shown.map((message) => viewOf(message).element));
  drawState();
}

function viewOf(message) {
  const actions = { edit, again, results, announce };
  const view = message.role === "user" ? new Question(message, actions) : new Answer(message, actions, resultsOf(message));
  views.set(message, view);
  return view;
}

function resultsOf(message) {
  const found = [];
  for (let at = talk.messages.indexOf(message) + 1; talk.messages[at]?.role === "tool"; at++) found.push(talk.messages[at]);
  return found;
}

function drawState() {
  const busy = running.has(talk.id);
  $("send").hidden = busy;
  $("stop").hidden = !busy;
  $("empty").hidden = talk.messages.length > 0;
  document.title = talk.title ? `${talk.title} - mlx-qwen35` : "mlx-qwen35";
}

function list() {
  const known = talks.list();
  const entries = known.map((head) => {
    const link = make("a", { href: `#${head.id}`, "aria-current": head.id === talk.id ? "page" : null }, head.title || "Untitled");
    const remove = button("Delete", () => forget(head));
    remove.setAttribute("aria-label", `Delete: ${head.title}`);
    return make("li", {}, link, remove);
  });
  $("talks").replaceChildren(...entries);
}

async function save(which) {
  which.changed = Date.now();
  try {
    const gone = await talks.write(which);
    if (gone) tell(`${MOST} conversations are kept: the oldest went for this one`);
  } catch (error) {
    tell(error.message);
  }
  list();
}

async function forget(head) {
  if (!(await sure(`Delete "${head.title || "Untitled"}"?`))) return;
  running.get(head.id)?.controller.abort();
  await talks.remove(head.id).catch((error) => tell(`It could not be deleted: ${error?.name}`));
  if (head.id === talk.id) await open(null);
  else list();
  $("new").focus();
}

// ---- asking ----

async function send() {
  const text = $("field").value.trim();
  if (running.has(talk.id) || !(text || chosen.length)) return;
  const message = { role: "user", text, pictures: chosen };
  if (!checked([...talk.messages, message])) return;
  talk.title ||= text.replace(/\s+/g, " ").slice(0, 60) || "A picture";
  add(talk, message);
  $("field").value = "";
  choose([]);
  grow();
  history.replaceState(null, "", `#${talk.id}`);
  await run(talk);
}

/** Another text for a message: what followed it goes, and it is answered. */
async function edit(message, text) {
  running.get(talk.id)?.controller.abort();
  message.text = text.trim();
  cut(talk.messages.indexOf(message) + 1);
  draw();
  $("field").focus();
  await run(talk);
}

async function again(message) {
  running.get(talk.id)?.controller.abort();
  cut(talk.messages.indexOf(message));
  draw();
  $("field").focus();
  await run(talk);
}

async function results(message, texts) {
  talk.messages.push(...message.calls.map((call, at) => ({ role: "tool", call: call.id, text: texts[at] })));
  draw();
  $("field").focus();
  await run(talk);
}

function cut(at) {
  talk.messages = talk.messages.slice(0, at);
}

/** The body of a request, or null where the settings make none, which is said. */
function checked(messages) {
  try {
    return bodyOf(messages, settings, $("model").value);
  } catch (error) {
    tell(`Settings, tools: ${error.message}`);
    return null;
  }
}

function add(which, message) {
  which.messages.push(message);
  if (which !== talk) return;
  $("messages").append(viewOf(message).element);
  drawState();
  toEnd();
}

/** Asks the server to answer a conversation, and follows it to its end. */
async function run(which) {
  const body = checked(which.messages);
  if (!body) return;
  const message = { role: "assistant", text: "", reasoning: "", calls: [], finish: null, note: "", stats: null };
  const mine = { controller: new AbortController(), message, talk: which };
  running.set(which.id, mine);
  $("announcer").replaceChildren();
  add(which, message);
  drawState();
  save(which);
  const clock = { began: performance.now(), first: 0, last: 0, answer: 0 };
  let saved = performance.now();
  try {
    for await (const event of answer(body, key, mine.controller.signal)) {
      take(event, message, clock);
      schedule();
      if (performance.now() - saved > SAVE_EVERY) {
        saved = performance.now();
        save(which);
      }
    }
    if (message.finish === null) message.finish = "stop";
    if (message.ended === "length") message.note = "The answer reached its length limit";
  } catch (error) {
    if (error.name === "AbortError") end(message, "Stopped");
    else {
      end(message, error instanceof ServerError ? error.message : `The page failed: ${error.message}`);
      message.failed = true;
      if (error.status === 401) askKey();
    }
  } finally {
    if (running.get(which.id) === mine) running.delete(which.id);
    if (which === talk) {
      views.get(message)?.update();
      drawState();
      if (message.note) announce(message.note);
    }
    if (which.messages.includes(message)) await save(which);
  }
}

function end(message, note) {
  message.finish = "ended";
  message.note = note;
}

/** Adds an event of the server to a message. */
function take(event, message, clock) {
  if (event.usage) {
    const { usage } = event;
    const spent = (clock.last - clock.first) / 1000;
    message.stats = {
      prompt: usage.prompt_tokens ?? 0,
      cached: usage.prompt_tokens_details?.cached_tokens ?? 0,
      answer: usage.completion_tokens ?? 0,
      perSecond: spent > 0.05 && usage.completion_tokens > 1 ? (usage.completion_tokens - 1) / spent : 0,
      first: clock.first ? (clock.first - clock.began) / 1000 : undefined,
    };
    return;
  }
  const now = performance.now();
  if (event.finish) {
    message.ended = event.finish;
    return;
  }
  clock.first ||= now;
  clock.last = now;
  if (event.reasoning) {
    message.reasoning += event.reasoning;
    message.thought = (now - clock.first) / 1000;
  } else if (event.content) {
    message.text += event.content;
  } else if (event.call) {
    const { index, id, name, arguments: text } = event.call;
    const call = (message.calls[index] ??= { id: "", name: "", arguments: "" });
    call.id ||= id ?? "";
    call.name ||= name ?? "";
    call.arguments += text ?? "";
  }
}

/** Shows what came, once a frame. */
function schedule() {
  frame ||= requestAnimationFrame(() => {
    frame = 0;
    const now = running.get(talk.id);
    if (!now) return;
    const near = isNearEnd();
    views.get(now.message)?.update();
    if (near) toEnd();
    showDown();
  });
}

/** Read out by screen readers: a block of an answer once it is whole, never single words. */
function announce(text) {
  if (text.trim()) $("announcer").append(make("p", {}, text.slice(0, 2000)));
}

// ---- the field and its pictures ----

function choose(urls) {
  chosen = urls;
  const entries = chosen.map((url, at) => {
    const remove = button("Remove", () => choose(chosen.filter((_, other) => other !== at)));
    remove.setAttribute("aria-label", `Remove picture ${at + 1}`);
    return make("li", {}, make("img", { src: url, alt: `Picture ${at + 1}` }), remove);
  });
  $("pictures").replaceChildren(...entries);
}

async function takeFiles(files) {
  for (const file of files) {
    if (chosen.length >= pictures.MOST) {
      tell(`At most ${pictures.MOST} pictures go with a message`);
      break;
    }
    try {
      choose([...chosen, await pictures.read(file)]);
    } catch (error) {
      tell(error.message);
    }
  }
  $("field").focus();
}

function grow() {
  const field = $("field");
  field.style.height = "auto";
  field.style.height = `${Math.min(field.scrollHeight, innerHeight * 0.4)}px`;
}

// ---- around it ----

function askKey() {
  $("key-row").hidden = false;
  if (!$("settings").open) $("settings").showModal();
  $("key").focus();
}

async function readModels() {
  try {
    const names = await models(key);
    const wanted = names.includes(settings.model) ? settings.model : names[0];
    $("model").replaceChildren(...names.map((name) => make("option", { selected: name === wanted }, name)));
    if (!names.length) tell("The server has no model: `mlx-qwen35 ls` lists what is on its machine");
  } catch (error) {
    if (error.status === 401) askKey();
    else tell(error.message);
  }
}

function readForm() {
  for (const name of FIELDS) settings[name] = $(name).value;
  try {
    toolsOf(settings.tools);
    $("tools-error").textContent = "";
  } catch (error) {
    $("tools-error").textContent = error.message;
  }
  writeSettings(settings);
}

function listen() {
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  $("field").addEventListener("input", grow);
  $("field").addEventListener("keydown", (event) => {
    if (event.isComposing || event.keyCode === 229) return; // a word is still being put together
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      send();
    } else if (event.key === "ArrowUp" && !$("field").value) {
      const last = talk.messages.findLast((message) => message.role === "user");
      if (!last) return;
      event.preventDefault();
      views.get(last).edit();
    }
  });
  $("stop").addEventListener("click", () => {
    running.get(talk.id)?.controller.abort();
    $("field").focus();
  });
  $("choose").addEventListener("click", () => $("files").click());
  $("files").addEventListener("change", () => {
    takeFiles([...$("files").files]);
    $("files").value = "";
  });
  document.addEventListener("paste", (event) => {
    const found = pictures.filesOf(event.clipboardData);
    if (!found.length || document.querySelector("dialog[open]")) return;
    event.preventDefault();
    takeFiles(found);
  });
  for (const name of ["dragenter", "dragover"]) {
    document.addEventListener(name, (event) => {
      if (![...event.dataTransfer.types].includes("Files")) return;
      event.preventDefault();
      document.body.classList.add("drops");
    });
  }
  document.addEventListener("dragleave", (event) => event.relatedTarget ?? document.body.classList.remove("drops"));
  document.addEventListener("drop", (event) => {
    document.body.classList.remove("drops");
    if (!event.dataTransfer.files.length) return;
    event.preventDefault();
    const found = pictures.filesOf(event.dataTransfer);
    if (found.length < event.dataTransfer.files.length) tell("Only pictures can be dropped here");
    takeFiles(found);
  });
  document.addEventListener("click", (event) => {
    const from = event.target.closest?.("[data-copies=code]");
    if (from) copy(from.closest("figure").querySelector("code").textContent, from);
  });
  document.addEventListener("keydown", (event) => {
    const dialog = document.querySelector("dialog[open]");
    const letter = event.altKey && !event.ctrlKey && !event.metaKey ? event.code : "";
    if (event.key === "Escape" && !dialog) {
      if (document.body.classList.contains("side-open")) closeSide();
      else running.get(talk.id)?.controller.abort();
    } else if ((event.ctrlKey || event.metaKey) && event.key === "/") {
      if (!dialog) $("keys").showModal();
    } else if (letter === "KeyN" && !dialog) {
      open(null);
    } else if (letter === "KeyP" && !dialog) {
      $("settings").showModal();
    } else if (letter === "KeyR" && !dialog) {
      const last = talk.messages.at(-1);
      if (last?.role === "assistant" && !running.has(talk.id)) again(last);
    } else return;
    event.preventDefault();
  });
  $("new").addEventListener("click", () => open(null));
  $("talks").addEventListener("click", (event) => {
    if (event.target.closest("a[aria-current]")) closeSide(); // it is shown already, and no other hash comes
  });
  addEventListener("hashchange", () => open(location.hash.slice(1)));
  $("open-side").addEventListener("click", openSide);
  $("close-side").addEventListener("click", closeSide);
  $("shade").addEventListener("click", closeSide);
  $("down").addEventListener("click", () => {
    toEnd();
    $("field").focus();
  });
  $("talk").addEventListener("scroll", showDown, { passive: true });
  $("notice").querySelector("button").addEventListener("click", () => {
    $("notice").hidden = true;
    $("field").focus();
  });
  $("open-settings").addEventListener("click", () => $("settings").showModal());
  $("open-keys").addEventListener("click", () => $("keys").showModal());
  $("model").addEventListener("change", () => {
    settings.model = $("model").value;
    writeSettings(settings);
  });
  for (const name of FIELDS) $(name).addEventListener("input", readForm);
  $("settings").addEventListener("close", () => {
    if ($("key").value === key) return;
    key = $("key").value;
    writeKey(key);
    $("notice").hidden = true;
    readModels();
  });
  $("delete-all").addEventListener("click", async () => {
    if (!(await sure("Delete all conversations of this browser?"))) return;
    for (const { controller } of running.values()) controller.abort();
    for (const head of talks.list()) await talks.remove(head.id).catch(() => {});
    await open(null);
  });
  addEventListener("pagehide", () => {
    for (const { talk: each } of running.values()) talks.write(each).catch(() => {});
  });
}

async function start() {
  for (const name of FIELDS) $(name).value = settings[name] ?? "";
  $("key").value = key;
  $("key-row").hidden = !key;
  listen();
  talks = await Talks.open();
  if (!talks.lasting) tell("This browser keeps nothing for this page: conversations are lost when it is closed");
  await open(location.hash.slice(1));
  await readModels();
}

start();
