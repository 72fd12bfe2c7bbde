// What every client on Node is asked here, and what is right; run.sh sets the address.
import { readFileSync } from "node:fs";

export const URL = process.env.BASE_URL;
export const KEY = "none";
export const MODEL = "bundled";
export const TREE = readFileSync(new globalThis.URL("../../tree.txt", import.meta.url), "utf8");
export const [DOCUMENT, QUESTION] = TREE.split(", Task:");
export const TAGGED = `<merge>${TREE}</merge>`;
export const TWO_PARTS = `<merge>${DOCUMENT}</merge><raw>, Task:${QUESTION}</raw>`;
export const TOO_LONG = "A ".repeat(10_000);

// What an answer in a schema is here.
export const VERDICT = {
  type: "object",
  properties: { right: { enum: ["true", "false"] } },
  required: ["right"],
  additionalProperties: false,
};
export const isVerdict = (found) => ["true", "false"].includes(found.right);

// Asks, and prints a line of the table: the client's own exception or answer, and a verdict.
export async function check(what, ask, right) {
  let found, good;
  try {
    found = await ask();
    good = typeof right === "function" ? right(found) : found === right;
  } catch (error) {
    [found, good] = [`${error.name}: ${error.message}`, false];
  }
  const shown = (typeof found === "string" ? found : JSON.stringify(found)) ?? "undefined";
  console.log([good ? "ok" : "FAILED", what, shown.split(/\s+/).join(" ").slice(0, 300)].join("\t"));
}

// What a client shows of a refusal.
export async function refused(ask) {
  try {
    return `not refused: ${JSON.stringify(await ask())}`;
  } catch (error) {
    return `${error.name}: ${error.message}`;
  }
}

export function overflows(shown) {
  return shown.includes("maximum context length is 4096 tokens") && !shown.startsWith("not refused");
}
