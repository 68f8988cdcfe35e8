// What is said to the server and what it says: POST /v1/chat/completions as a stream, GET /v1/models.
// Knows the interface. Knows nothing of the page.

/** What the server refused, or what came of it. status: of HTTP, 0 where there was no answer. */
export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** The names of the models that can be asked. */
export async function models(key) {
  const response = await asked("v1/models", { headers: headers(key) });
  const { data } = await response.json();
  return (Array.isArray(data) ? data : []).map((model) => String(model.id));
}

/** A conversation as the body of a request. settings: values of the form, "" for what the model does by itself. */
export function bodyOf(messages, settings, model) {
  const body = {
    model: model || undefined,
    messages: messages.flatMap(written),
    stream: true,
    stream_options: { include_usage: true },
  };
  if (settings.system?.trim()) body.messages.unshift({ role: "system", content: settings.system });
  for (const name of ["temperature", "top_p", "top_k", "max_tokens"]) {
    if (settings[name] !== "" && settings[name] !== undefined) body[name] = Number(settings[name]);
  }
  if (settings.thinking) body.enable_thinking = settings.thinking === "on";
  const tools = toolsOf(settings.tools ?? "");
  if (tools.length) body.tools = tools;
  return body;
}

/** The tools of the settings; throws an Error that says what is wrong with them. */
export function toolsOf(text) {
  if (!text.trim()) return [];
  let tools;
  try {
    tools = JSON.parse(text);
  } catch (error) {
    throw new Error(`This is not valid JSON: ${error.message}`);
  }
  if (!Array.isArray(tools)) throw new Error("Give a list of tools: [...]");
  return tools.map((tool, at) => {
    const whole = tool?.function ? tool : { type: "function", function: tool };
    if (typeof whole.function?.name !== "string") throw new Error(`Tool ${at + 1} has no name`);
    return whole;
  });
}

/** The events of an answer: {reasoning}, {content}, {call: {index, id, name, arguments}}, {finish}, {usage}.
 *  Throws ServerError; AbortError where `signal` ended it. */
export async function* answer(body, key, signal) {
  const response = await asked("v1/chat/completions", {
    method: "POST",
    headers: { ...headers(key), "content-type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  let finished = false;
  for await (const data of events(response, signal)) {
    if (data === "[DONE]") break;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(chunk.error.message ?? "The server ended the answer", 500);
    if (chunk.usage) yield { usage: chunk.usage };
    const choice = chunk.choices?.[0];
    const delta = choice?.delta ?? {};
    const reasoning = delta.reasoning_content ?? delta.reasoning;
    if (reasoning) yield { reasoning };
    if (delta.content) yield { content: delta.content };
    for (const call of delta.tool_calls ?? []) {
      yield { call: { index: call.index ?? 0, id: call.id, name: call.function?.name, arguments: call.function?.arguments } };
    }
    if (choice?.finish_reason) {
      finished = true;
      yield { finish: choice.finish_reason };
    }
  }
  if (!finished) throw new ServerError("The connection ended before the answer did");
}

async function asked(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server does not answer: is it running?");
  }
  if (response.ok) return response;
  let message = `The server answers with ${response.status}`;
  try {
    const told = await response.json();
    message = told.error?.message ?? message;
  } catch {
    // an error without JSON has a status, and that has to do
  }
  const wait = response.headers.get("retry-after");
  throw new ServerError(wait ? `${message} (ask again in ${wait} s)` : message, response.status);
}

function headers(key) {
  return key ? { authorization: `Bearer ${key}` } : {};
}

/** The data of server-sent events. */
async function* events(response, signal) {
  const reader = response.body.getReader();
  signal.addEventListener("abort", () => reader.cancel().catch(() => {}));
  const decoder = new TextDecoder();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      rest += done ? `${decoder.decode()}\n\n` : decoder.decode(value, { stream: true });
      const lines = rest.split("\n");
      rest = lines.pop();
      for (const line of lines.map((each) => each.replace(/\r$/, ""))) {
        if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        else if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
      if (done) return void signal.throwIfAborted();
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ServerError) throw error;
    throw new ServerError("The connection was lost");
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** A message of the page as messages of the interface. */
function written(message) {
  if (message.role === "user") {
    const pictures = (message.pictures ?? []).map((url) => ({ type: "image_url", image_url: { url } }));
    const text = message.text ? [{ type: "text", text: message.text }] : [];
    return [{ role: "user", content: pictures.length ? [...pictures, ...text] : message.text }];
  }
  if (message.role === "tool") return [{ role: "tool", tool_call_id: message.call, content: message.text }];
  const made = { role: "assistant", content: message.text };
  if (message.reasoning) made.reasoning_content = message.reasoning;
  if (message.calls?.length) {
    made.tool_calls = message.calls.map((call) => ({
      id: call.id,
      type: "function",
      function: { name: call.name, arguments: call.arguments || "{}" },
    }));
  }
  return message.text || message.calls?.length ? [made] : [];
}
