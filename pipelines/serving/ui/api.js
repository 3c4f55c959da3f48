// The server: which model there is, and one answer as a stream.

export class ApiError extends Error {
  constructor(status, message, retryAfter) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

let key = sessionStorage.getItem("api-key") ?? "";

export function setKey(value) {
  key = value;
  sessionStorage.setItem("api-key", value);
}

function headers() {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

export async function firstModel() {
  const response = await fetch("v1/models", { headers: headers() });
  if (!response.ok) throw await errorOf(response);
  return (await response.json()).data[0].id;
}

/** Yields {text} while the answer comes, then {finishReason, boxes} and {usage}. */
export async function* streamAnswer(body, signal) {
  const response = await fetch("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json", ...headers() },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  if (!response.ok) throw await errorOf(response);
  for await (const event of events(response.body)) {
    if (event === "[DONE]") return;
    const chunk = JSON.parse(event);
    if (chunk.error) throw new ApiError(500, chunk.error.message);
    if (chunk.usage) yield { usage: chunk.usage };
    const [choice] = chunk.choices;
    if (choice?.delta.content) yield { text: choice.delta.content };
    if (choice?.finish_reason) yield { finishReason: choice.finish_reason, boxes: choice.delta.boxes ?? [] };
  }
  throw new ApiError(500, "The connection ended in the middle of the answer.");
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
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
  try {
    message = (await response.json()).error.message;
  } catch {
    // not from our server (a proxy's page, say): the status has to do
  }
  return new ApiError(response.status, message, Number(response.headers.get("Retry-After")) || 0);
}
