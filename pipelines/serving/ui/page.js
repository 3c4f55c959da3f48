// The page around the conversation: light and dark, images that are chosen, pasted or dropped, fields that grow.

/** Follow the saved theme, or the system's; the button switches. */
export function startTheme(button) {
  const root = document.documentElement;
  const saved = localStorage.getItem("theme");
  if (saved) root.dataset.theme = saved;
  button.addEventListener("click", () => {
    const isDark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = isDark ? "light" : "dark";
    localStorage.setItem("theme", root.dataset.theme);
  });
}

/** Call `onImage(file, name)` for a file that is chosen, pasted or dropped anywhere on the page: of several, for the first image. */
export function listenForImages({ input, drop, onImage }) {
  input.addEventListener("change", () => {
    const [file] = input.files;
    if (file) onImage(file, file.name);
    input.value = "";
  });

  document.addEventListener("paste", (event) => {
    const { files, types } = event.clipboardData;
    const file = [...files].find(isImage);
    const isText = types.includes("text/plain") && types.includes("text/html"); // office programs add an image of it
    if (file && !isText) {
      event.preventDefault();
      onImage(file, "pasted image");
    }
  });

  let depth = 0;
  const hasFiles = (event) => [...event.dataTransfer.types].includes("Files");
  document.addEventListener("dragenter", (event) => {
    if (hasFiles(event)) depth += 1;
    drop.hidden = depth === 0;
  });
  document.addEventListener("dragleave", (event) => {
    if (hasFiles(event)) depth -= 1;
    drop.hidden = depth <= 0;
  });
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    depth = 0;
    drop.hidden = true;
    const [file, ...others] = [...event.dataTransfer.files].sort((a, b) => isImage(b) - isImage(a));
    if (file) onImage(file, file.name, { numOthers: others.filter(isImage).length });
  });
}

function isImage({ type }) {
  return type.startsWith("image/");
}

/** Make a text field as high as its text. */
export function grow(field) {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + field.offsetHeight - field.clientHeight}px`; // its border is part of it
}
