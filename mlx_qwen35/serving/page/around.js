// What is around a conversation: words to whoever sits there, the drawer, and where the messages are scrolled to.
// Knows the elements of the page. Knows nothing of what is said.

const NEAR = 80; // pixels from the end that count as the end

export const $ = (id) => document.getElementById(id);

/** Something that whoever sits there has to know. */
export function tell(text) {
  $("notice").hidden = false;
  $("notice").querySelector("span").textContent = text;
}

/** Whether something is to be deleted. */
export function sure(text) {
  const dialog = $("confirm");
  $("confirm-text").textContent = text;
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true }));
}

/** Whether the end of the messages is in sight. */
export function isNearEnd() {
  const place = $("talk");
  return place.scrollHeight - place.scrollTop - place.clientHeight < NEAR;
}

export function toEnd() {
  $("talk").scrollTop = $("talk").scrollHeight;
  showDown();
}

export function showDown() {
  $("down").hidden = isNearEnd();
}

/** The drawer of a narrow window. */
export function openSide() {
  document.body.classList.add("side-open");
  $("shade").hidden = false;
  $("open-side").setAttribute("aria-expanded", "true");
  $("close-side").focus();
}

export function closeSide() {
  const was = document.body.classList.contains("side-open");
  document.body.classList.remove("side-open");
  $("shade").hidden = true;
  $("open-side").setAttribute("aria-expanded", "false");
  if (was) $("open-side").focus();
}
