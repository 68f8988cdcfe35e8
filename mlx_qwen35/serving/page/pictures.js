// Pictures that are to be sent: from a drop, the clipboard or a file, made no larger than a model looks at.
// Knows files and canvases.

import { make } from "./inline.js";

export const MOST = 8; // pictures in a message
const SIDE = 1568; // pixels of the longer side
const SMALL = 400_000; // bytes of a file that is sent as it is

/** A file as a data: URL, smaller if it is large. Throws an Error that says what is wrong. */
export async function read(file) {
  const name = file.name || "the picture";
  if (!file.type.startsWith("image/")) throw new Error(`${name} is no picture`);
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new Error(`${name} is a picture that this browser cannot read: save it as PNG or JPEG`);
  }
  const scale = Math.min(1, SIDE / Math.max(bitmap.width, bitmap.height));
  const plain = ["image/png", "image/jpeg", "image/webp"].includes(file.type);
  if (scale === 1 && plain && file.size <= SMALL) {
    bitmap.close();
    return asUrl(file);
  }
  const canvas = make("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  const context = canvas.getContext("2d");
  context.fillStyle = "white"; // JPEG has no transparency
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return canvas.toDataURL("image/jpeg", 0.9);
}

/** The pictures among what was dropped or pasted. */
export function filesOf(transfer) {
  return [...(transfer?.files ?? [])].filter((file) => file.type.startsWith("image/"));
}

function asUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${file.name} cannot be read`));
    reader.readAsDataURL(file);
  });
}
