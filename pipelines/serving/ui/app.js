// The page: what happens when somebody clicks, types, drops, pastes.

import { ApiError, firstModel, setKey, streamAnswer } from "./api.js";
import { Conversation } from "./conversation.js";
import { Picture } from "./picture.js";

const $ = (id) => document.getElementById(id);

const TASKS = [
  { id: "", name: "Chat", hint: "Ask about the picture" },
  { id: "vqa", name: "Short answer", hint: "A question with a short answer" },
  { id: "caption", name: "Caption", hint: "Press send for a caption", optional: true },
  { id: "refer", name: "Find", hint: "What should be found? e.g. the red star" },
  { id: "identify", name: "What is this?", hint: "Draw a box, then press send", optional: true, box: true },
  { id: "grounding", name: "Describe with boxes", hint: "Press send for a description", optional: true },
  { id: "detection", name: "Mark phrases", hint: "Phrases to mark in the picture" },
];

const EXAMPLES = [
  { file: "ui/example-1.jpg", task: "vqa", text: "what color is the star?" },
  { file: "ui/example-2.jpg", task: "refer", text: "the yellow square" },
  { file: "ui/example-3.jpg", task: "grounding", text: "" },
  { file: "ui/example-4.jpg", task: "caption", text: "" },
];

const picture = new Picture({ frame: $("frame"), image: $("image"), overlay: $("overlay"), onBox: showBoxFields });
const conversation = new Conversation({ list: $("messages"), announcer: $("announcer"), picture });

let model = "";
let turns = []; // {role, content} as they are sent
let running = null; // AbortController of the answer that is being written

// ---------------------------------------------------------------- tasks and examples

for (const task of TASKS) {
  const label = document.createElement("label");
  const input = Object.assign(document.createElement("input"), { type: "radio", name: "task", value: task.id, checked: !task.id });
  input.addEventListener("change", showTask);
  label.append(input, task.name);
  $("tasks").append(label);
}

for (const example of EXAMPLES) {
  const task = TASKS.find(({ id }) => id === example.task);
  const button = document.createElement("button");
  button.type = "button";
  const image = Object.assign(document.createElement("img"), { src: example.file, alt: "Example picture" });
  const words = document.createElement("span");
  words.append(Object.assign(document.createElement("em"), { textContent: task.name }), example.text || "no words needed");
  button.append(image, words);
  button.addEventListener("click", async () => {
    const blob = await (await fetch(example.file)).blob();
    if (!(await openPicture(blob, "example"))) return;
    chooseTask(example.task);
    $("question").value = example.text;
    await ask();
  });
  const item = document.createElement("li");
  item.append(button);
  $("examples").append(item);
}

function chosenTask() {
  return TASKS.find(({ id }) => id === document.querySelector("input[name=task]:checked").value);
}

function chooseTask(id) {
  document.querySelector(`input[name=task][value="${id}"]`).checked = true;
  showTask();
}

function showTask() {
  const task = chosenTask();
  const chip = document.querySelector("input[name=task]:checked").parentElement;
  // On a phone the tasks are one row that scrolls.
  $("tasks").scrollTo({ left: chip.offsetLeft - ($("tasks").clientWidth - chip.offsetWidth) / 2 });
  $("question").placeholder = picture.isLoaded ? task.hint : "Ask anything";
  picture.isDrawing = Boolean(task.box) && picture.isLoaded;
  $("box-fields").hidden = !task.box || !picture.isLoaded;
  for (const input of document.querySelectorAll("input[name=task]")) input.disabled = Boolean(input.value) && !picture.isLoaded;
  showReady();
}

function showReady() {
  const task = chosenTask();
  const enough = $("question").value.trim() || (picture.isLoaded && task.optional && (!task.box || picture.drawn));
  $("send").disabled = !enough;
  $("send").hidden = Boolean(running);
  $("stop").hidden = !running;
}

// ---------------------------------------------------------------- the drawn box, as numbers

const BOX_INPUTS = ["box-x1", "box-y1", "box-x2", "box-y2"].map($);

function showBoxFields(box) {
  const sides = [picture.width, picture.height, picture.width, picture.height];
  BOX_INPUTS.forEach((input, i) => {
    if (document.activeElement !== input) input.value = box ? Math.floor((box[i] / sides[i]) * 100) : "";
  });
  showReady();
}

for (const input of BOX_INPUTS) {
  input.addEventListener("input", () => {
    const [x1, y1, x2, y2] = BOX_INPUTS.map((field) => field.valueAsNumber);
    picture.setDrawn(x2 > x1 && y2 > y1 ? picture.toPixels([x1, y1, x2, y2]) : null);
  });
}

// ---------------------------------------------------------------- pictures

async function openPicture(file, name) {
  running?.abort();
  try {
    await picture.load(file, name);
  } catch (error) {
    conversation.error(error.message);
    return false;
  }
  turns = [];
  conversation.clear();
  $("empty").hidden = true;
  $("stage").hidden = false;
  $("caption").textContent = `${name ? `${name} · ` : ""}${picture.width} × ${picture.height} pixels`;
  chooseTask(chosenTask().id);
  // On a touch screen this would open the keyboard over the picture.
  if (matchMedia("(pointer: fine)").matches) $("question").focus({ preventScroll: true });
  return true;
}

function newChat() {
  running?.abort();
  turns = [];
  conversation.clear();
  picture.clear();
  $("empty").hidden = false;
  $("stage").hidden = true;
  $("question").value = "";
  chooseTask("");
}

$("file").addEventListener("change", (event) => {
  const [file] = event.target.files;
  if (file) openPicture(file, file.name);
  event.target.value = "";
});

document.addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find(({ type }) => type.startsWith("image/"));
  if (file) {
    event.preventDefault();
    openPicture(file, "pasted picture");
  }
});

let dragDepth = 0;
const hasFiles = (event) => [...event.dataTransfer.types].includes("Files");
document.addEventListener("dragenter", (event) => {
  if (hasFiles(event)) dragDepth += 1;
  $("drop").hidden = dragDepth === 0;
});
document.addEventListener("dragleave", (event) => {
  if (hasFiles(event)) dragDepth -= 1;
  $("drop").hidden = dragDepth <= 0;
});
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  dragDepth = 0;
  $("drop").hidden = true;
  const [file] = event.dataTransfer.files;
  if (file) openPicture(file, file.name);
});

// ---------------------------------------------------------------- questions and answers

async function ask() {
  const task = chosenTask();
  const text = $("question").value.trim();
  if (running || (!text && !task.optional)) return;
  const content = [];
  if (picture.isLoaded && turns.length === 0) content.push({ type: "image_url", image_url: { url: picture.url } });
  if (text) content.push({ type: "text", text });
  const options = {};
  if (task.id) options.task = task.id;
  if (task.box && picture.drawn) options.box = picture.drawn;
  conversation.question(text || task.name, task.id && text ? task.name : "");
  $("question").value = "";
  grow();
  await answer({ role: "user", content }, options);
}

async function answer(question, options) {
  running = new AbortController();
  showReady();
  const writing = conversation.answer();
  let reason = null;
  let boxes = [];
  let usage = null;
  try {
    const body = {
      model,
      messages: [...turns, question],
      temperature: Number($("temperature").value),
      max_tokens: Math.max(1, $("max-tokens").valueAsNumber || 256),
      ...options,
    };
    for await (const event of streamAnswer(body, running.signal)) {
      if (event.text) writing.push(event.text);
      reason = event.finishReason ?? reason;
      boxes = event.boxes ?? boxes;
      usage = event.usage ?? usage;
    }
    keep(question, options, writing.text);
    writing.finish({ boxes, usage, reason });
  } catch (error) {
    if (error.name === "AbortError") {
      if (writing.text) keep(question, options, writing.text);
      writing.finish({ boxes, usage, reason: "stopped" });
    } else {
      writing.remove();
      await report(error, () => answer(question, options));
    }
  } finally {
    running = null;
    showReady();
  }
}

/** Remember a turn. The task's field goes with the last question only, so an earlier one carries its tag in the text. */
function keep({ content }, { task, box }, text) {
  const images = content.filter(({ type }) => type === "image_url");
  const words = content.find(({ type }) => type === "text")?.text ?? "";
  const asked = [task ? `[${task}]` : "", words, box ? picture.boxText(box) : ""].filter(Boolean).join(" ");
  turns.push({ role: "user", content: [...images, { type: "text", text: asked }] }, { role: "assistant", content: text });
}

async function report(error, retry) {
  if (error instanceof ApiError && error.status === 401) {
    if (await askForKey()) retry();
    return;
  }
  if (error instanceof ApiError && error.retryAfter) {
    conversation.error(`${error.message} (in about ${error.retryAfter} s)`, retry);
    return;
  }
  const message = error instanceof ApiError ? error.message : "The server cannot be reached.";
  conversation.error(message, retry);
}

function askForKey() {
  const dialog = $("key-dialog");
  dialog.returnValue = "cancel";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener(
      "close",
      () => {
        const given = dialog.returnValue === "ok" && $("key").value !== "";
        if (given) setKey($("key").value);
        $("key").value = "";
        resolve(given);
      },
      { once: true },
    );
  });
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
$("stop").addEventListener("click", () => running?.abort());
$("new-chat").addEventListener("click", newChat);
$("question").addEventListener("input", () => {
  grow();
  showReady();
});
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!$("send").disabled) ask();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running) running.abort();
});
$("temperature").addEventListener("input", () => {
  $("temperature-value").textContent = $("temperature").value;
});

function grow() {
  const field = $("question");
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight}px`;
}

// ---------------------------------------------------------------- theme and connection

const savedTheme = localStorage.getItem("theme");
if (savedTheme) document.documentElement.dataset.theme = savedTheme;
$("theme").addEventListener("click", () => {
  const isDark = getComputedStyle(document.documentElement).colorScheme.includes("dark")
    ? document.documentElement.dataset.theme === "dark" || (!document.documentElement.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches)
    : false;
  const theme = isDark ? "light" : "dark";
  document.documentElement.dataset.theme = theme;
  localStorage.setItem("theme", theme);
});

async function connect() {
  const status = $("status");
  try {
    model = await firstModel();
    status.dataset.state = "ready";
    status.textContent = model;
  } catch (error) {
    if (error instanceof ApiError && error.status === 401 && (await askForKey())) {
      await connect();
      return;
    }
    status.dataset.state = "gone";
    status.textContent = error instanceof ApiError ? "not ready" : "not reachable";
    setTimeout(connect, 3000);
  }
}

showTask();
connect();
