// The conversation on the screen: messages, phrases tied to boxes, what screen readers hear.

import { colourOf, parseAnswer, wordsOf } from "./markup.js";

export class Conversation {
  constructor({ list, announcer, image }) {
    this.list = list;
    this.announcer = announcer;
    this.image = image;
  }

  clear() {
    this.list.replaceChildren();
    this.announcer.textContent = "";
  }

  /** A line of the page itself; `code` is a command to copy. */
  note(text, code) {
    const item = this.add("note");
    item.append(text);
    if (code) item.append(Object.assign(document.createElement("code"), { textContent: code }));
  }

  /** A question; `onEdit` puts it back into the composer. */
  question(text, tag, onEdit) {
    const item = this.add("user");
    if (tag) item.append(Object.assign(document.createElement("span"), { className: "tag", textContent: tag }));
    item.append(Object.assign(document.createElement("span"), { className: "words", textContent: text }));
    item.append(actions([["Edit", "Edit this question and ask again", onEdit]]));
    return item;
  }

  /** Why there is no answer; `retry` where asking again may help. */
  error(text, retry) {
    const item = this.add("error");
    item.setAttribute("role", "alert");
    item.append(text);
    if (retry) {
      const button = Object.assign(document.createElement("button"), { type: "button", className: "quiet small", textContent: "Try again" });
      button.addEventListener("click", () => {
        item.remove();
        retry();
      });
      item.append(" ", button);
    }
    this.scroll();
  }

  /** An empty answer that is being written; `phrase` is what a box without words of its own is about. */
  answer(phrase) {
    return new Answer(this, phrase);
  }

  /** Remove a message and all that came after it. */
  removeFrom(item) {
    while (item) {
      const next = item.nextElementSibling;
      item.remove();
      item = next;
    }
  }

  add(kind) {
    const item = Object.assign(document.createElement("li"), { className: `message ${kind}` });
    this.list.append(item);
    this.scroll();
    return item;
  }

  scroll() {
    this.list.scrollTop = this.list.scrollHeight;
    this.list.lastElementChild?.scrollIntoView({ block: "nearest" });
  }
}

class Answer {
  constructor(conversation, phrase) {
    this.conversation = conversation;
    this.phrase = phrase;
    this.text = "";
    this.item = conversation.add("assistant");
    this.body = document.createElement("span");
    this.body.className = "writing";
    this.item.append(this.body);
    this.started = performance.now();
  }

  push(text) {
    this.text += text;
    this.render(false);
  }

  /** The answer is over. `boxes` are the server's, in pixels of the image; `notes` go into the footer. */
  finish({ boxes, usage, notes, onRegenerate }) {
    this.body.classList.remove("writing");
    this.render(true, boxes);
    const seconds = (performance.now() - this.started) / 1000;
    const counts = usage ? [`${usage.completion_tokens} ${usage.completion_tokens === 1 ? "token" : "tokens"} in ${seconds.toFixed(1)} s`] : [];
    const footer = document.createElement("footer");
    footer.append(Object.assign(document.createElement("span"), { textContent: [...counts, ...notes].join(" · ") }));
    footer.append(
      actions([
        ["Copy", "Copy the answer", (event) => copy(this.shownText(), event.currentTarget)],
        ["Regenerate", "Answer this question again", onRegenerate],
      ]),
    );
    this.item.append(footer);
    this.conversation.announcer.textContent = `Answer: ${this.shownText() || "empty"}`;
    this.conversation.scroll();
  }

  /** What a reader sees: words, and coordinates of boxes. */
  shownText() {
    return this.body.textContent;
  }

  /** A line under the answer, such as the truth of a drawn scene. */
  addLine(label, text) {
    const line = Object.assign(document.createElement("p"), { className: "truth-line" });
    line.append(Object.assign(document.createElement("strong"), { textContent: label }), ` ${text}`);
    this.item.querySelector("footer").before(line);
    this.conversation.scroll();
  }

  remove() {
    this.item.remove();
  }

  render(isFinished, boxes) {
    const { image } = this.conversation;
    const parts = parseAnswer(this.text, isFinished);
    this.body.replaceChildren(...parts.map((part) => (part.text === undefined ? this.phraseElement(part) : part.text)));
    if (isFinished && !wordsOf(this.text) && !parts.some((part) => part.boxes)) this.body.textContent = "(no answer)";
    if (!image.isLoaded) return;
    image.showBoxes(boxes?.length ? boxes.map((box) => ({ ...box, label: box.label || this.phrase })) : this.found(parts));
    this.conversation.scroll();
  }

  found(parts) {
    const { image } = this.conversation;
    return parts
      .filter((part) => part.boxes)
      .flatMap(({ phrase, entity, boxes }) =>
        boxes.map((box) => ({ label: phrase || this.phrase, entity, box: image.toPixels(box), colour: colourOf(entity) })),
      );
  }

  phraseElement({ phrase, entity, boxes }) {
    const { image } = this.conversation;
    const button = Object.assign(document.createElement("button"), { type: "button", className: "phrase", textContent: phrase || this.phrase });
    button.style.setProperty("--colour", colourOf(entity));
    const light = (on) => () => image.light(on ? entity : null);
    for (const [event, on] of [["mouseenter", true], ["focus", true], ["mouseleave", false], ["blur", false]]) {
      button.addEventListener(event, light(on));
    }
    button.addEventListener("click", () => {
      image.showBoxes(this.found(parseAnswer(this.text, true)));
      image.light(entity);
    });
    const wrapper = document.createElement("span");
    wrapper.append(button);
    // A sentence with phrases stays readable; an answer that is a box says where it is.
    if (!phrase && image.isLoaded) {
      const corners = boxes.map((box) => image.inPixels(image.toPixels(box))).join("; ");
      wrapper.append(Object.assign(document.createElement("span"), { className: "coordinates", textContent: ` at ${corners}` }));
    }
    return wrapper;
  }
}

function actions(entries) {
  const group = Object.assign(document.createElement("span"), { className: "actions" });
  for (const [text, label, onClick] of entries) {
    if (!onClick) continue;
    const button = Object.assign(document.createElement("button"), { type: "button", className: "quiet", textContent: text });
    button.setAttribute("aria-label", label);
    button.addEventListener("click", onClick);
    group.append(button);
  }
  return group;
}

async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Pages that do not come over https or from this machine have no clipboard.
    const field = Object.assign(document.createElement("textarea"), { value: text });
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
  }
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = "Copy"), 1500);
}
