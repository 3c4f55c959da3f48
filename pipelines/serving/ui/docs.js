// The API page: the schema that the server gives, as tables, and two ways to call it.

const base = new URL("v1", location.href).href;
const schema = await (await fetch("openapi.json")).json();

const cell = (text, name = "td") => Object.assign(document.createElement(name), { textContent: text });

function addRow(table, ...cells) {
  const row = document.createElement("tr");
  row.append(...cells);
  table.append(row);
}

document.getElementById("base").textContent = base;
document.getElementById("python").textContent = `from openai import OpenAI
import base64

client = OpenAI(base_url="${base}", api_key="none")
image = base64.b64encode(open("photo.jpg", "rb").read()).decode()
answer = client.chat.completions.create(
    model="tinygpt-v",
    messages=[{"role": "user", "content": [
        {"type": "text", "text": "the dog"},
        {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{image}"}},
    ]}],
    extra_body={"task": "refer"},
)
print(answer.choices[0].message.content, answer.choices[0].message.boxes)`;
document.getElementById("curl").textContent = `curl ${base}/chat/completions -H 'Content-Type: application/json' \\
  -d '{"model": "tinygpt-v", "messages": [{"role": "user", "content": "hello"}]}'`;

for (const [path, methods] of Object.entries(schema.paths)) {
  for (const [method, operation] of Object.entries(methods)) {
    const name = cell("");
    name.append(Object.assign(document.createElement("span"), { className: "method", textContent: method.toUpperCase() }), path);
    addRow(document.getElementById("paths"), name, cell(operation.description ?? ""));
  }
}

for (const [id, kind] of Object.entries({ fields: "ChatRequest", "responses-fields": "ResponsesRequest" })) {
  const request = schema.components.schemas[kind];
  for (const [name, field] of Object.entries(request.properties)) {
    const types = (field.anyOf ?? [field]).map((type) => type.type ?? type.$ref?.split("/").pop() ?? "").filter((type) => type !== "null");
    const required = request.required.includes(name) ? "required" : "";
    addRow(document.getElementById(id), cell(name, "th"), cell(types.join(" or ")), cell(field.description ?? required));
  }
}
