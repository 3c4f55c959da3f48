// The image: reading it, the boxes on it, and the box that a person draws on it.

const SVG = "http://www.w3.org/2000/svg";
const LARGEST_SIDE = 2048; // more than the model can use; larger photographs are shrunk before they are sent
const LARGEST_BYTES = 6_000_000;
const SERVER_READS = ["image/jpeg", "image/png", "image/webp", "image/gif", "image/bmp", ""]; // browsers know more

export class ImageView {
  /** @param {{frame: HTMLElement, image: HTMLImageElement, overlay: SVGElement, onBox: (box: number[]|null) => void}} parts */
  constructor({ frame, image, overlay, onBox }) {
    this.frame = frame;
    this.image = image;
    this.overlay = overlay;
    this.onBox = onBox;
    this.url = "";
    this.width = 0; // of the image as it is sent
    this.height = 0;
    this.fileWidth = 0; // of the file, which a person knows
    this.fileHeight = 0;
    this.drawn = null;
    this.numLoads = 0;
    this.listenForDrawing();
  }

  get isLoaded() {
    return this.url !== "";
  }

  /** Show a file; it is sent as it is, unless it is very large or of a kind that only browsers read. Throws where the browser cannot.
   *  False where another one was chosen before this one was read. */
  async load(file, name) {
    this.numLoads += 1;
    const number = this.numLoads;
    let url = await readAsDataUrl(file);
    let bitmap;
    try {
      bitmap = await createImageBitmap(file, { imageOrientation: "from-image" });
    } catch {
      throw new Error(`${name || "This file"} is not an image that this browser can read (JPEG, PNG, WebP, GIF, BMP).`);
    }
    let { width, height } = bitmap;
    const isAvifOrHeic = (await file.slice(4, 8).text()) === "ftyp"; // also one that is called photo.jpg
    const [fileWidth, fileHeight] = [width, height];
    if (Math.max(width, height) > LARGEST_SIDE || file.size > LARGEST_BYTES || isAvifOrHeic || !SERVER_READS.includes(file.type)) {
      const scale = Math.min(1, LARGEST_SIDE / Math.max(width, height));
      [width, height] = [width, height].map((side) => Math.max(1, Math.round(side * scale)));
      const canvas = Object.assign(document.createElement("canvas"), { width, height });
      const context = canvas.getContext("2d");
      context.fillStyle = "#fff"; // what the server lays transparent images on; JPEG would make it black
      context.fillRect(0, 0, width, height);
      context.drawImage(bitmap, 0, 0, width, height);
      url = canvas.toDataURL("image/jpeg", 0.92);
    }
    bitmap.close();
    if (number !== this.numLoads) return false;
    Object.assign(this, { url, width, height, fileWidth, fileHeight });
    this.image.src = url;
    this.image.alt = name ? `Your image: ${name}` : "Your image";
    try {
      await this.image.decode();
    } catch (error) {
      if (number === this.numLoads) throw error;
    }
    if (number !== this.numLoads) return false;
    this.overlay.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.showBoxes([]);
    this.setDrawn(null);
    return true;
  }

  clear() {
    this.numLoads += 1;
    this.url = "";
    this.image.removeAttribute("src");
    this.showBoxes([]);
    this.setDrawn(null);
  }

  /** Pixels of the image from the model's 0..100 grid. */
  toPixels([x1, y1, x2, y2]) {
    return [(x1 / 100) * this.width, (y1 / 100) * this.height, (x2 / 100) * this.width, (y2 / 100) * this.height];
  }

  /** A box as a person reads it, in pixels of the file. */
  inPixels([x1, y1, x2, y2]) {
    const [across, down] = [this.fileWidth / this.width, this.fileHeight / this.height];
    const [left, top, right, bottom] = [x1 * across, y1 * down, x2 * across, y2 * down].map(Math.round);
    return `(${left}, ${top}) – (${right}, ${bottom}) px`;
  }

  /** Draw boxes: {label, box (pixels), entity, colour}. */
  showBoxes(boxes) {
    this.overlay.replaceChildren(...boxes.map((found, index) => this.boxElement(found, index)));
    if (this.drawnElement) this.overlay.append(this.drawnElement);
  }

  /** Draw the true box of a scene beside the model's. */
  showTruth([x1, y1, x2, y2]) {
    const truth = element("rect", { class: "truth", x: x1, y: y1, width: x2 - x1, height: y2 - y1 });
    truth.append(element("title", {}, "the true box"));
    this.overlay.append(truth);
  }

  /** Make the boxes of one phrase stand out; null for none. */
  light(entity) {
    this.overlay.classList.toggle("has-lit", entity !== null);
    for (const group of this.overlay.querySelectorAll("g.found")) {
      group.classList.toggle("lit", entity !== null && group.dataset.entity === String(entity));
    }
  }

  boxElement({ label, box, entity, colour }, index) {
    const [x1, y1, x2, y2] = box;
    const rect = { x: Math.min(x1, x2), y: Math.min(y1, y2), width: Math.abs(x2 - x1), height: Math.abs(y2 - y1) };
    const group = element("g", { class: "found", "data-entity": entity, role: "img" });
    group.setAttribute("aria-label", `Box ${index + 1}: ${label || "found here"}`);
    group.append(element("title", {}, label || "found here"));
    group.append(element("rect", { class: "box shadow", ...rect }));
    group.append(element("rect", { class: "box", ...rect, stroke: colour, fill: colour }));
    if (label) group.append(this.labelElement(label, rect, colour));
    return group;
  }

  labelElement(label, rect, colour) {
    // Letters keep their size on the screen, whatever the image's.
    const shown = this.frame.getBoundingClientRect();
    const scale = Math.max(this.width / (shown.width || 1), this.height / (shown.height || 1)) || 1;
    const height = 20 * scale;
    const width = (textWidth(label) + 12) * scale;
    const x = Math.max(0, Math.min(rect.x, this.width - width));
    const y = rect.y >= height ? rect.y - height : rect.y;
    const group = element("g", {});
    group.append(element("rect", { x, y, width, height, fill: colour, rx: 4 * scale }));
    const text = element("text", { x: x + 6 * scale, y: y + 14.5 * scale, fill: readableOn(colour) }, label);
    text.style.fontSize = `${13 * scale}px`;
    group.append(text);
    return group;
  }

  // ---------------------------------------------------------------- drawing a box

  set isDrawing(on) {
    this.frame.dataset.drawing = String(on);
    if (!on) this.setDrawn(null);
  }

  /** The box that a person wants to ask about, in pixels; null for none. */
  setDrawn(box) {
    this.drawn = box;
    this.drawnElement?.remove();
    this.drawnElement = null;
    if (box) {
      const [x1, y1, x2, y2] = box;
      this.drawnElement = element("rect", { class: "drawn", x: x1, y: y1, width: x2 - x1, height: y2 - y1 });
      this.overlay.append(this.drawnElement);
    }
    this.onBox(box);
  }

  listenForDrawing() {
    let start = null;
    this.overlay.addEventListener("pointerdown", (event) => {
      if (this.frame.dataset.drawing !== "true" || event.button !== 0) return;
      start = this.positionOf(event);
      this.overlay.setPointerCapture(event.pointerId);
      event.preventDefault();
    });
    this.overlay.addEventListener("pointermove", (event) => {
      if (start) this.setDrawn(ordered(start, this.positionOf(event)));
    });
    const end = (event) => {
      if (!start) return;
      const box = ordered(start, this.positionOf(event));
      start = null;
      const tooSmall = box[2] - box[0] < this.width / 100 || box[3] - box[1] < this.height / 100;
      this.setDrawn(tooSmall ? null : box);
    };
    this.overlay.addEventListener("pointerup", end);
    this.overlay.addEventListener("pointercancel", end);
  }

  /** Where a pointer is, in pixels of the image. */
  positionOf(event) {
    const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(this.overlay.getScreenCTM().inverse());
    return [Math.max(0, Math.min(point.x, this.width)), Math.max(0, Math.min(point.y, this.height))];
  }
}

let measure = null;

/** Width of a label on the screen, in pixels. */
function textWidth(text) {
  measure ??= document.createElement("canvas").getContext("2d");
  measure.font = "600 13px system-ui, sans-serif";
  return measure.measureText(text).width;
}

function ordered([ax, ay], [bx, by]) {
  return [Math.min(ax, bx), Math.min(ay, by), Math.max(ax, bx), Math.max(ay, by)];
}

function element(name, attributes, text) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text) node.textContent = text;
  return node;
}

function readableOn(colour) {
  const [red, green, blue] = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
  return 0.299 * red + 0.587 * green + 0.114 * blue > 150 ? "#000" : "#fff";
}

function readAsDataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error("The file could not be read."));
    reader.readAsDataURL(file);
  });
}
