// The openai package on Node.
import OpenAI from "openai";
import {
  check, DOCUMENT, isVerdict, KEY, MODEL, overflows, QUESTION, refused, TAGGED, TOO_LONG, TREE, URL, VERDICT,
} from "./checks.mjs";

const client = new OpenAI({ baseURL: URL, apiKey: KEY, maxRetries: 0 });
const own = { model: MODEL, max_tokens: 4 };
const chat = (content, more) =>
  client.chat.completions.create({ ...own, messages: [{ role: "user", content }], ...more });
const complete = (prompt, more) => client.completions.create({ ...own, prompt, ...more });

async function streamed(stream) {
  let text = "";
  for await (const piece of await stream) {
    for (const choice of piece.choices) text += choice.text ?? choice.delta.content ?? "";
  }
  return text;
}

const parts = [
  { type: "text", text: DOCUMENT, merge: true },
  { type: "text", text: `, Task:${QUESTION}`, merge: false },
];
const tool = { type: "function", function: { name: "look", parameters: { type: "object" } } };
const inSchema = {
  max_tokens: 60,
  response_format: { type: "json_schema", json_schema: { name: "verdict", schema: VERDICT } },
};
const helper = () =>
  client.chat.completions.stream({ ...own, messages: [{ role: "user", content: TREE }] }).finalContent();

await check("models", async () => (await client.models.list()).data[0].id, MODEL);
await check("completion", async () => (await complete(TREE)).choices[0].text, "true");
await check("completion, streamed", () => streamed(complete(TREE, { stream: true })), "true");
await check("chat", async () => (await chat(TREE)).choices[0].message.content, "true");
await check("chat, streamed", () => streamed(chat(TREE, { stream: true })), "true");
await check("its stream helper", helper, "true");
await check("tags", async () => (await chat(TAGGED)).choices[0].message.content, "true");
await check("usage", async () => (await chat(TAGGED)).usage, (u) => u.merged_tokens > 0);
await check("document and question", async () => (await chat(parts)).usage, (u) => u.raw_tokens > 0);
await check("stop", async () => (await chat(TREE, { stop: "e" })).choices[0].message.content, "tru");
await check("too long", () => refused(() => chat(TOO_LONG)), overflows);
await check("in a schema", async () => JSON.parse((await chat(TREE, inSchema)).choices[0].message.content), isVerdict);
await check(
  "in a schema, streamed",
  async () => JSON.parse(await streamed(chat(TREE, { ...inSchema, stream: true }))),
  isVerdict,
);
await check("tools", async () => (await chat(TREE, { tools: [tool] })).choices[0].finish_reason, (r) => r !== "tool_calls");
