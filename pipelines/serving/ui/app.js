// The page: what happens when somebody clicks, types, drops, pastes.

import { ApiError, firstModel, isHealthy, newScene, setKey, streamAnswer } from "./api.js";
import { Conversation } from "./conversation.js";
import { ImageView } from "./image.js";
import { grow, listenForImages, startTheme } from "./page.js";

const $ = (id) => document.getElementById(id);

const TASKS = [
  { id: "", name: "Chat", hint: "Ask about the image" },
  { id: "vqa", name: "Short answer", hint: "A question with a short answer" },
  { id: "caption", name: "Caption", hint: "Press send for a caption", optional: true },
  { id: "refer", name: "Find", hint: "What should be found? e.g. the red star" },
  { id: "identify", name: "What is this?", hint: "Draw a box, then press send", optional: true, box: true },
  { id: "grounding", name: "Describe with boxes", hint: "Press send for a description", optional: true },
  { id: "detection", name: "Mark phrases", hint: "Phrases to mark in the image" },
];

const EXAMPLES = [
  { file: "ui/example-1.jpg", task: "vqa", text: "what color is the star?" },
  { file: "ui/example-2.jpg", task: "refer", text: "the yellow square" },
  { file: "ui/example-3.jpg", task: "grounding", text: "" },
  { file: "ui/example-4.jpg", task: "caption", text: "" },
];

const DRAWN = "drawn scenes";
const HEALTH_EVERY_MS = 10_000;
const REGENERATE_TEMPERATURE = 0.7; // where the answer was greedy, and would be the same again

const image = new ImageView({ frame: $("frame"), image: $("image"), overlay: $("overlay"), onBox: showBoxFields });
const conversation = new Conversation({ list: $("messages"), announcer: $("announcer"), image });

let model = { id: "", context_length: 0, scope: "" };
let turns = []; // {role, content: text} of the chat; tasks go without, and are not part of it
let running = null; // AbortController of the answer that is being written
let isWatching = false;
let scene = null; // the drawn scene that is shown, with its true answer

// ---------------------------------------------------------------- tasks

for (const task of TASKS) {
  const label = document.createElement("label");
  const input = Object.assign(document.createElement("input"), { type: "radio", name: "task", value: task.id, checked: !task.id });
  input.addEventListener("change", showTask);
  label.append(input, task.name);
  $("tasks").append(label);
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
  $("question").placeholder = image.isLoaded ? task.hint : "Choose an image, or write without one";
  image.isDrawing = Boolean(task.box) && image.isLoaded;
  $("box-fields").hidden = !task.box || !image.isLoaded;
  for (const input of document.querySelectorAll("input[name=task]")) input.disabled = Boolean(input.value) && !image.isLoaded;
  showReady();
}

function showReady() {
  const task = chosenTask();
  const isEnough = $("question").value.trim() || (image.isLoaded && task.optional && (!task.box || image.drawn));
  $("send").disabled = !isEnough;
  $("send").hidden = Boolean(running);
  $("stop").hidden = !running;
}

// ---------------------------------------------------------------- the drawn box, as numbers

const BOX_INPUTS = ["box-x1", "box-y1", "box-x2", "box-y2"].map($);

function showBoxFields(box) {
  const sides = [image.width, image.height, image.width, image.height];
  BOX_INPUTS.forEach((input, i) => {
    if (document.activeElement !== input) input.value = box ? Math.floor((box[i] / sides[i]) * 100) : "";
  });
  showReady();
}

for (const input of BOX_INPUTS) {
  input.addEventListener("input", () => {
    const [x1, y1, x2, y2] = BOX_INPUTS.map((field) => field.valueAsNumber);
    image.setDrawn(x2 > x1 && y2 > y1 ? image.toPixels([x1, y1, x2, y2]) : null);
  });
}

// ---------------------------------------------------------------- images and scenes

/** Show an image and start over; false where it is none, or another one has been chosen. */
async function openImage(file, name, { isOwn = true, numOthers = 0 } = {}) {
  try {
    if (!(await image.load(file, name))) return false;
  } catch (error) {
    conversation.error(error.message);
    return false;
  }
  scene = null;
  startOver();
  $("empty").hidden = true;
  $("stage").hidden = false;
  $("caption").textContent = `${name ? `${name} · ` : ""}${image.fileWidth} × ${image.fileHeight} pixels`;
  chooseTask(chosenTask().id);
  if (numOthers) conversation.note(`One image at a time: ${name} is shown, ${numOthers} more of what was dropped ${numOthers === 1 ? "is" : "are"} not.`);
  if (isOwn && model.scope === DRAWN) {
    conversation.note(
      "This model knows drawn scenes only: what it says about a photograph is wrong. The released model knows photographs (8.6 GB, docs/weights.md):",
      "make released",
    );
  }
  // On a touch screen this would open the keyboard over the image.
  if (matchMedia("(pointer: fine)").matches) $("question").focus({ preventScroll: true });
  return true;
}

async function showScene() {
  $("new-scene").disabled = true;
  try {
    const drawn = await newScene();
    if (!(await openImage(drawn.file, "drawn scene", { isOwn: false }))) return;
    scene = drawn;
    chooseTask(drawn.task);
    $("question").value = drawn.question;
    grow($("question"));
    showReady();
  } catch (error) {
    await report(error, showScene);
  } finally {
    $("new-scene").disabled = false;
  }
}

for (const example of EXAMPLES) {
  const task = TASKS.find(({ id }) => id === example.task);
  const button = document.createElement("button");
  button.type = "button";
  const thumbnail = Object.assign(document.createElement("img"), { src: example.file, alt: "Example image" });
  const words = document.createElement("span");
  words.append(Object.assign(document.createElement("em"), { textContent: task.name }), example.text || "no words needed");
  button.append(thumbnail, words);
  button.addEventListener("click", async () => {
    const blob = await (await fetch(example.file)).blob();
    if (!(await openImage(blob, "example", { isOwn: false }))) return;
    chooseTask(example.task);
    $("question").value = example.text;
    await ask();
  });
  const item = document.createElement("li");
  item.append(button);
  $("examples").append(item);
}

/** Give up the answer that is being written. */
function interrupt() {
  running?.abort();
  running = null;
  showReady();
}

/** Clear the conversation; the image stays. */
function startOver() {
  interrupt();
  turns = [];
  conversation.clear();
  if (image.isLoaded) image.showBoxes([]);
}

function removeImage() {
  startOver();
  scene = null;
  image.clear();
  $("empty").hidden = false;
  $("stage").hidden = true;
  $("question").value = "";
  chooseTask("");
}

listenForImages({ input: $("file"), drop: $("drop"), onImage: openImage });

// ---------------------------------------------------------------- questions and answers

async function ask() {
  const task = chosenTask();
  const text = $("question").value.trim();
  if (running || (!text && !task.optional)) return;
  const asked = { task, text, box: task.box ? image.drawn : null };
  $("question").value = "";
  grow($("question"));
  await answer(asked, showQuestion(asked));
}

/** Put a question on the screen, with the way back to it. */
function showQuestion(asked) {
  const numTurns = turns.length;
  const item = conversation.question(asked.text || asked.task.name, asked.task.id && asked.text ? asked.task.name : "", () => {
    interrupt();
    turns = turns.slice(0, numTurns);
    conversation.removeFrom(item);
    chooseTask(asked.task.id);
    if (asked.box) image.setDrawn(asked.box);
    $("question").value = asked.text;
    grow($("question"));
    showReady();
    $("question").focus();
  });
  return item;
}

function requestFor(asked, history, sampling) {
  const messages = [...history, { role: "user", content: asked.text }].map(({ role, content }) => ({ role, content }));
  if (image.isLoaded) {
    const url = { type: "image_url", image_url: { url: image.url } };
    const [first] = messages;
    first.content = first.content ? [url, { type: "text", text: first.content }] : [url];
  }
  const body = { model: model.id, messages, ...sampling };
  if (asked.task.id) body.task = asked.task.id;
  if (asked.box) body.box = asked.box;
  return body;
}

function chosenSampling() {
  return { temperature: Number($("temperature").value), max_tokens: Math.max(1, $("max-tokens").valueAsNumber || 256) };
}

/** Ask the model; `sampling` changes what the options say. */
async function answer(asked, questionItem, sampling = {}) {
  running = new AbortController();
  const { signal } = running;
  showReady();
  const isChat = !asked.task.id;
  const options = { ...chosenSampling(), ...sampling };
  const writing = conversation.answer(asked.text || "here");
  const state = { reason: null, boxes: [], usage: null };
  try {
    await read(asked, isChat, options, writing, state, signal);
    finish(asked, questionItem, isChat, options, writing, state);
  } catch (error) {
    if (error.name === "AbortError") {
      if (questionItem.isConnected) finish(asked, questionItem, isChat, options, writing, { ...state, reason: "stopped" });
      else writing.remove();
    } else {
      writing.remove();
      await report(error, () => answer(asked, questionItem, sampling), asked);
    }
  } finally {
    if (running?.signal === signal) running = null;
    showReady();
  }
}

/** Read the answer into `writing`; a chat that does not fit leaves out its oldest turns. */
async function read(asked, isChat, options, writing, state, signal) {
  if (!model.id) await findModel();
  for (;;) {
    try {
      for await (const event of streamAnswer(requestFor(asked, isChat ? turns : [], options), signal)) {
        if (event.text) writing.push(event.text);
        state.reason = event.finishReason ?? state.reason;
        state.boxes = event.boxes ?? state.boxes;
        state.usage = event.usage ?? state.usage;
      }
      return;
    } catch (error) {
      if (error.code !== "context_length_exceeded" || !isChat || turns.length === 0) throw error;
      turns = turns.slice(2);
      state.hasLeftOut = true;
    }
  }
}

function finish(asked, questionItem, isChat, options, writing, { reason, boxes, usage, hasLeftOut }) {
  if (isChat && writing.text) turns.push({ role: "user", content: asked.text }, { role: "assistant", content: writing.text });
  const notes = [];
  const isFull = usage && model.context_length && usage.total_tokens >= model.context_length;
  if (reason === "length") notes.push(isFull ? "cut: the context is full" : `cut at ${options.max_tokens} tokens (Options)`);
  if (reason === "stopped") notes.push("stopped");
  if (hasLeftOut) notes.push("earlier turns were left out: the context was full");
  const numTurns = turns.length;
  const canRegenerate = () => {
    if (running) return;
    conversation.removeFrom(questionItem.nextElementSibling);
    if (isChat) turns = turns.slice(0, Math.max(0, numTurns - 2));
    const warmer = options.temperature ? {} : { temperature: REGENERATE_TEMPERATURE };
    answer(asked, questionItem, warmer);
  };
  if (options.temperature && !Number($("temperature").value)) notes.push(`temperature ${options.temperature}`);
  writing.finish({ boxes, usage, notes, onRegenerate: canRegenerate });
  if (scene && asked.text === scene.question && asked.task.id === scene.task && reason === "stop") showTruth(writing);
}

function showTruth(writing) {
  if (scene.box) {
    image.showTruth(scene.box);
    writing.addLine("Truth:", `${image.inPixels(scene.box)} (dashed)`);
  } else {
    writing.addLine("Truth:", scene.answer);
  }
}

async function report(error, retry, asked) {
  if (!(error instanceof ApiError)) throw error;
  if (error.status === 401) {
    if (await askForKey()) retry();
    return;
  }
  if (error.code === "context_length_exceeded" && asked) {
    $("question").value = asked.text; // to shorten it
    grow($("question"));
  }
  const wait = error.retryAfter ? ` Try again in about ${error.retryAfter} s.` : "";
  conversation.error(error.message + wait, error.canRetry ? retry : null);
  showReady();
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
$("new-chat").addEventListener("click", startOver);
$("remove-image").addEventListener("click", removeImage);
$("new-scene").addEventListener("click", showScene);
$("another-scene").addEventListener("click", showScene);
$("question").addEventListener("input", () => {
  grow($("question"));
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

// ---------------------------------------------------------------- connection

function showStatus(state, text) {
  $("status").dataset.state = state;
  $("status-text").textContent = text;
}

function showModel() {
  showStatus("ready", model.id);
  $("scope").textContent = model.scope;
  $("scope").hidden = !model.scope;
  const knowsScenes = model.scope === DRAWN;
  for (const element of document.querySelectorAll(".scenes-only")) element.hidden = !knowsScenes;
}

/** Ask for the model, and follow the server from then on. */
async function findModel() {
  model = await firstModel();
  showModel();
  if (!isWatching) setTimeout(watch, HEALTH_EVERY_MS);
  isWatching = true;
}

async function connect() {
  try {
    await findModel();
  } catch (error) {
    if (error.status === 401) {
      if (await askForKey()) await connect();
      else showStatus("gone", "needs an API key"); // the next question asks for it again
      return;
    }
    showStatus("gone", error.status ? "not ready" : "not reachable");
    setTimeout(connect, 3000);
  }
}

/** Follow the server: the dot tells whether the model can answer now. */
async function watch() {
  if (document.visibilityState === "visible") {
    if (await isHealthy()) {
      if ($("status").dataset.state !== "ready") model = await firstModel().catch(() => model);
      showModel();
    } else {
      showStatus("gone", "not ready");
    }
  }
  setTimeout(watch, $("status").dataset.state === "ready" ? HEALTH_EVERY_MS : 3000);
}

document.addEventListener("visibilitychange", () => {
  if (document.visibilityState === "visible" && model.id) isHealthy().then((ok) => (ok ? showModel() : showStatus("gone", "not ready")));
});

startTheme($("theme"));
showTask();
connect();
