// The AI SDK with @ai-sdk/openai-compatible.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, jsonSchema, Output, streamText, tool } from "ai";
import {
  check, isVerdict, KEY, MODEL, overflows, refused, TAGGED, TOO_LONG, TREE, TWO_PARTS, URL, VERDICT,
} from "./checks.mjs";

const server = createOpenAICompatible({
  name: "kmerge", baseURL: URL, apiKey: KEY, includeUsage: true, supportsStructuredOutputs: true,
});
const [model, completing] = [server.chatModel(MODEL), server.completionModel(MODEL)];
const own = { maxOutputTokens: 4, maxRetries: 0 };
const ask = (prompt, more) => generateText({ model, prompt, ...own, ...more });
const usage = async (prompt) => (await ask(prompt)).usage;

async function streamed(model) {
  let text = "";
  for await (const piece of streamText({ model, prompt: TREE, ...own }).textStream) text += piece;
  return text;
}

const inSchema = { maxOutputTokens: 60, output: Output.object({ schema: jsonSchema(VERDICT) }) };

async function streamedObject() {
  let last;
  const answer = streamText({ model, prompt: TREE, ...own, ...inSchema });
  for await (const part of answer.partialOutputStream) last = part;
  return last;
}

const look = tool({
  description: "Looks at a place.",
  inputSchema: jsonSchema({ type: "object", properties: { at: { type: "number" } } }),
  execute: async ({ at }) => String(at),
});

// It writes "user:" and "assistant:" around a prompt, which the bundled model never saw.
await check("completion", async () => (await ask(TREE, { model: completing })).text, Boolean);
await check("completion, streamed", () => streamed(completing), Boolean);
await check("chat", async () => (await ask(TREE)).text, "true");
await check("chat, streamed", () => streamed(model), "true");
await check("tags", async () => (await ask(TAGGED)).text, "true");
await check("usage", () => usage(TAGGED), (u) => u.raw.merged_tokens > 0);
await check("document and question", () => usage(TWO_PARTS), (u) => u.raw.raw_tokens > 0);
await check("stop", async () => (await ask(TREE, { stopSequences: ["e"] })).text, "tru");
await check("system", async () => (await ask(TREE, { system: "<raw> </raw>" })).text, Boolean);
await check("too long", () => refused(() => ask(TOO_LONG)), overflows);
await check("in a schema", async () => (await ask(TREE, inSchema)).output, isVerdict);
await check("in a schema, streamed", streamedObject, isVerdict);
await check("tools", async () => (await ask(TREE, { tools: { look } })).toolCalls.length, 0);
