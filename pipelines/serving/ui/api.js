// The server: which model there is, whether it can answer, drawn scenes, and one answer as a stream.

export class ApiError extends Error {
  constructor(status, message, { code = null, retryAfter = 0 } = {}) {
    super(message);
    this.status = status;
    this.code = code;
    this.retryAfter = retryAfter;
  }

  /** Whether the same request may succeed later. */
  get canRetry() {
    return this.status === 0 || this.status === 408 || this.status === 429 || this.status >= 500;
  }
}

let key = sessionStorage.getItem("api-key") ?? "";

export function setKey(value) {
  key = value;
  sessionStorage.setItem("api-key", value);
}

async function request(path, options = {}) {
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server cannot be reached.");
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

/** The served model: {id, context_length, scope}. */
export async function firstModel() {
  return (await (await request("v1/models")).json()).data[0];
}

/** Whether the model can answer now. */
export async function isHealthy() {
  try {
    await request("healthz", { signal: AbortSignal.timeout(8000) });
    return true;
  } catch {
    return false;
  }
}

/** A new drawn scene: {file, task, question, answer, box}. */
export async function newScene() {
  const { image, ...scene } = await (await request("ui/scene")).json();
  const bytes = Uint8Array.from(atob(image.slice(image.indexOf(",") + 1)), (character) => character.charCodeAt(0));
  return { ...scene, file: new Blob([bytes], { type: "image/jpeg" }) };
}

/** Yields {text} while the answer comes, then {finishReason, boxes} and {usage}. */
export async function* streamAnswer(body, signal) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  for await (const event of events(response.body)) {
    if (event === "[DONE]") return;
    const chunk = JSON.parse(event);
    if (chunk.error) throw new ApiError(500, chunk.error.message, { code: chunk.error.code });
    if (chunk.usage) yield { usage: chunk.usage };
    const [choice] = chunk.choices;
    if (choice?.delta.content) yield { text: choice.delta.content };
    if (choice?.finish_reason) yield { finishReason: choice.finish_reason, boxes: choice.delta.boxes ?? [] };
  }
  throw brokenOff();
}

function brokenOff() {
  return new ApiError(0, "The connection ended in the middle of the answer.");
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : brokenOff();
    });
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (part.startsWith("data: ")) yield part.slice(6);
    }
  }
}

async function errorOf(response) {
  let message = `The server answered with status ${response.status}.`;
  let code = null;
  try {
    ({ message, code } = (await response.json()).error);
  } catch {
    // not from our server (a proxy's page, say): the status has to do
  }
  return new ApiError(response.status, message, { code, retryAfter: Number(response.headers.get("Retry-After")) || 0 });
}
