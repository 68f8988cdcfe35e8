// Conversations in this browser: IndexedDB where it is to be had, else memory. Settings: localStorage; the key of the
// server only until the tab is closed.
// Knows what a conversation is called and when it changed. Knows nothing of what is in it.

export const MOST = 200; // conversations
const NAME = "mlx-qwen35";
const SETTINGS = `${NAME}.settings`;
const KEY = `${NAME}.key`;

/** The conversations. full: why the last of them could not be written, or "". */
export class Talks {
  static async open() {
    const talks = new Talks();
    try {
      talks.database = await opened();
      const heads = await told(talks.store("heads", "readonly").getAll());
      talks.heads = new Map(heads.map((head) => [head.id, head]));
    } catch {
      talks.database = null;
    }
    return talks;
  }

  constructor() {
    this.database = null;
    this.heads = new Map(); // id -> {id, title, changed}
    this.memory = new Map(); // id -> conversation, where there is no database
  }

  get lasting() {
    return this.database !== null;
  }

  /** Those that there are, the latest first: {id, title, changed}. */
  list() {
    return [...this.heads.values()].sort((one, other) => other.changed - one.changed);
  }

  async read(id) {
    if (!this.database) return this.memory.get(id) ?? null;
    return (await told(this.store("talks", "readonly").get(id))) ?? null;
  }

  /** Keeps a conversation -> how many old ones went for it. Throws an Error that says why it could not be kept. */
  async write(talk) {
    const head = { id: talk.id, title: talk.title, changed: talk.changed };
    const old = this.list().filter((each) => each.id !== talk.id).slice(MOST - 1);
    this.heads.set(talk.id, head);
    if (!this.database) {
      this.memory.set(talk.id, talk);
    } else {
      try {
        await this.change((heads, talks) => {
          talks.put(talk);
          heads.put(head);
        });
      } catch (error) {
        const full = error?.name === "QuotaExceededError";
        throw new Error(
          full
            ? "The browser has no room left for this conversation: delete others, or it is lost when the page is closed"
            : `This conversation could not be kept (${error?.name ?? "unknown"}): it is lost when the page is closed`,
        );
      }
    }
    for (const each of old) await this.remove(each.id);
    return old.length;
  }

  async remove(id) {
    this.heads.delete(id);
    this.memory.delete(id);
    if (this.database) {
      await this.change((heads, talks) => {
        heads.delete(id);
        talks.delete(id);
      });
    }
  }

  store(name, mode) {
    return this.database.transaction(name, mode).objectStore(name);
  }

  change(act) {
    return new Promise((resolve, reject) => {
      const transaction = this.database.transaction(["heads", "talks"], "readwrite");
      transaction.oncomplete = () => resolve();
      transaction.onerror = transaction.onabort = (event) => reject(transaction.error ?? event.target?.error);
      act(transaction.objectStore("heads"), transaction.objectStore("talks"));
    });
  }
}

function opened() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => {
      request.result.createObjectStore("heads", { keyPath: "id" });
      request.result.createObjectStore("talks", { keyPath: "id" });
    };
    request.onsuccess = () => resolve(request.result);
    request.onerror = request.onblocked = () => reject(request.error);
  });
}

function told(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

/** Another id, also where the page came without encryption and randomUUID is missing. */
export function newId() {
  const numbers = crypto.getRandomValues(new Uint32Array(4));
  return [...numbers].map((number) => number.toString(36)).join("");
}

/** A conversation in which nothing was said. */
export function empty() {
  return { id: newId(), title: "", created: Date.now(), changed: Date.now(), messages: [] };
}

export function readSettings() {
  try {
    const found = JSON.parse(localStorage.getItem(SETTINGS) ?? "{}");
    return found && typeof found === "object" ? found : {};
  } catch {
    return {};
  }
}

export function writeSettings(settings) {
  try {
    localStorage.setItem(SETTINGS, JSON.stringify(settings));
  } catch {
    // a browser that keeps nothing still has them until the page is closed
  }
}

export function readKey() {
  try {
    return sessionStorage.getItem(KEY) ?? "";
  } catch {
    return "";
  }
}

export function writeKey(key) {
  try {
    sessionStorage.setItem(KEY, key);
  } catch {
    // as above
  }
}
