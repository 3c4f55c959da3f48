// An answer's text -> words, coloured phrases and boxes. The rules are those of tinygptv/data/boxes.py.

export const COLOURS = ["#e63946", "#2a9d8f", "#457be6", "#f4a22a", "#9b59d0", "#2ec4de", "#78aa28", "#e254a0"];

const PIECE = /<p>([\s\S]*?)<\/p>\s*(\{<[\d<>]*\}(?:\s*(?:<delim>)?\s*\{<[\d<>]*\})*)|(\{<\d{1,3}><\d{1,3}><\d{1,3}><\d{1,3}>\})/g;
const BOX = /\{<(\d{1,3})><(\d{1,3})><(\d{1,3})><(\d{1,3})>\}/g;

// Marks of any kind, whole or broken: tags, boxes with too few numbers, "p>" without its "<".
const MARKS = /<\/?p>|<?\/?delim>|\s*\{<[\d<>]*\}?|(?:<\d{1,3}>)+\}?|(?<![A-Za-z0-9])\/?p>/g;
// A mark at the end that is not whole: a stream may complete it, so it is not shown yet; nobody shows it after the end.
const BEGUN = /\s*(?:<\/?p?|<d(?:e(?:l(?:i(?:m)?)?)?)?|<\d{0,3}|\{<?[\d<>]*)\s*$/;

export function colourOf(entity) {
  return COLOURS[entity % COLOURS.length];
}

/** Split text into {text} and {phrase, entity, boxes} parts; boxes are x1, y1, x2, y2 on the 0..100 grid. */
export function parseAnswer(text, isFinished) {
  const shown = isFinished ? text : withoutOpenPhrase(text);
  const parts = [];
  let end = 0;
  let entity = 0;
  for (const match of shown.matchAll(PIECE)) {
    pushText(parts, shown.slice(end, match.index));
    end = match.index + match[0].length;
    const boxes = [...(match[2] ?? match[3]).matchAll(BOX)].map((box) => box.slice(1).map(Number));
    if (boxes.length) {
      parts.push({ phrase: withoutMarks(match[1] ?? "").trim(), entity, boxes });
      entity += 1;
    } else {
      pushText(parts, match[1] ?? "");
    }
  }
  pushText(parts, shown.slice(end).replace(BEGUN, ""));
  return parts;
}

/** The words of an answer, as a reader sees them. */
export function wordsOf(text) {
  return parseAnswer(text, true)
    .map((part) => part.text ?? part.phrase)
    .join("")
    .trim();
}

function withoutOpenPhrase(text) {
  const start = text.lastIndexOf("<p>");
  // A phrase whose boxes may still come is held back from its beginning.
  if (start >= 0 && !/<\/p>\s*\{<[\d<>]*\}/.test(text.slice(start)) && !/<\/p>\s*[^\s{<]/.test(text.slice(start))) {
    return text.slice(0, start);
  }
  return text;
}

function withoutMarks(text) {
  return text.replace(MARKS, "");
}

function pushText(parts, text) {
  let words = withoutMarks(text);
  if (parts.at(-1)?.boxes) words = words.replace(/^\s+(?=[,.;:!?])/, ""); // the model writes " ," after a box
  if (words) parts.push({ text: words });
}
