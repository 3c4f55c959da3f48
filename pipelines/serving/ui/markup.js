// An answer's text -> words, coloured phrases and boxes. The rules are those of tinygptv/data/boxes.py.

export const COLOURS = ["#e63946", "#2a9d8f", "#457be6", "#f4a22a", "#9b59d0", "#2ec4de", "#78aa28", "#e254a0"];

const PIECE = /<p>([\s\S]*?)<\/p>\s*(\{<[\d<>]*\}(?:\s*(?:<delim>)?\s*\{<[\d<>]*\})*)|(\{<\d{1,3}><\d{1,3}><\d{1,3}><\d{1,3}>\})/g;
const BOX = /\{<(\d{1,3})><(\d{1,3})><(\d{1,3})><(\d{1,3})>\}/g;
// What a stream may have begun and not finished: it is not shown until the rest has come.
const UNFINISHED = /(?:<p>(?:(?!<\/p>)[\s\S])*|<\/?p?|<\/p>\s*(?:\{[\d<>]*)?|\{<?[\d<>]*|<d?e?l?i?m?)$/;

export function colourOf(entity) {
  return COLOURS[entity % COLOURS.length];
}

/** Split text into {text} and {phrase, entity, boxes} parts; boxes are x1, y1, x2, y2 on the 0..100 grid. */
export function parseAnswer(text, finished) {
  const shown = finished ? text : withoutUnfinished(text);
  const parts = [];
  let end = 0;
  let entity = 0;
  for (const match of shown.matchAll(PIECE)) {
    pushText(parts, shown.slice(end, match.index));
    end = match.index + match[0].length;
    const boxes = [...(match[2] ?? match[3]).matchAll(BOX)].map((box) => box.slice(1).map(Number));
    if (boxes.length) {
      parts.push({ phrase: match[1]?.trim() ?? "", entity, boxes });
      entity += 1;
    } else {
      pushText(parts, match[1] ?? "");
    }
  }
  pushText(parts, shown.slice(end));
  return parts;
}

function withoutUnfinished(text) {
  const start = text.lastIndexOf("<p>");
  // A phrase whose boxes may still be coming is held back from its beginning.
  if (start >= 0 && !/<\/p>\s*\{<[\d<>]*\}/.test(text.slice(start)) && !/<\/p>\s*[^\s{<]/.test(text.slice(start))) {
    return text.slice(0, start);
  }
  return text.replace(UNFINISHED, "");
}

function pushText(parts, text) {
  const words = text.replace(/\s*\{<[\d<>]*\}|<delim>|<\/?p>/g, "");
  if (words) parts.push({ text: words });
}
