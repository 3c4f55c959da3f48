// The conversation on the screen: messages, phrases tied to boxes, what screen readers hear.

import { colourOf, parseAnswer } from "./markup.js";

export class Conversation {
  constructor({ list, announcer, picture }) {
    this.list = list;
    this.announcer = announcer;
    this.picture = picture;
  }

  clear() {
    this.list.replaceChildren();
    this.announcer.textContent = "";
  }

  /** A line that nobody said. */
  note(text) {
    this.add("note").textContent = text;
  }

  question(text, tag) {
    const item = this.add("user");
    if (tag) item.append(Object.assign(document.createElement("span"), { className: "tag", textContent: tag }));
    item.append(text);
  }

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
  }

  /** An empty answer that is being written. */
  answer() {
    return new Answer(this);
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
  constructor(conversation) {
    this.conversation = conversation;
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

  /** The answer is over. `boxes` are the server's, in pixels of the picture. */
  finish({ boxes, usage, reason }) {
    this.body.classList.remove("writing");
    this.render(true, boxes);
    const seconds = (performance.now() - this.started) / 1000;
    const facts = [];
    if (usage) facts.push(`${usage.completion_tokens} ${usage.completion_tokens === 1 ? "token" : "tokens"} in ${seconds.toFixed(1)} s`);
    if (reason === "length") facts.push("cut at the longest length");
    if (reason === "stopped") facts.push("stopped");
    const footer = document.createElement("footer");
    footer.append(facts.join(" · "));
    this.item.append(footer);
    this.conversation.announcer.textContent = `Answer: ${this.body.textContent || "empty"}`;
    this.conversation.scroll();
  }

  remove() {
    this.item.remove();
  }

  render(finished, boxes) {
    const { picture } = this.conversation;
    const parts = parseAnswer(this.text, finished);
    this.body.replaceChildren(...parts.map((part) => (part.text === undefined ? this.phrase(part) : part.text)));
    if (finished && !this.body.textContent) this.body.textContent = "(no answer)";
    if (!picture.isLoaded) return;
    const found = parts
      .filter((part) => part.boxes)
      .flatMap(({ phrase, entity, boxes: own }) =>
        own.map((box) => ({ label: phrase, entity, box: picture.toPixels(box), colour: colourOf(entity) })),
      );
    picture.showBoxes(boxes?.length ? boxes : found);
    this.conversation.scroll();
  }

  phrase({ phrase, entity }) {
    const button = Object.assign(document.createElement("button"), { type: "button", className: "phrase", textContent: phrase || "here" });
    button.style.setProperty("--colour", colourOf(entity));
    const light = (on) => () => this.conversation.picture.light(on ? entity : null);
    for (const [event, on] of [["mouseenter", true], ["focus", true], ["mouseleave", false], ["blur", false]]) {
      button.addEventListener(event, light(on));
    }
    button.addEventListener("click", () => {
      const found = parseAnswer(this.text, true).filter((part) => part.boxes);
      this.conversation.picture.showBoxes(
        found.flatMap((part) =>
          part.boxes.map((box) => ({
            label: part.phrase,
            entity: part.entity,
            box: this.conversation.picture.toPixels(box),
            colour: colourOf(part.entity),
          })),
        ),
      );
      this.conversation.picture.light(entity);
    });
    return button;
  }
}
