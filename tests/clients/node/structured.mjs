// Answers of a given form: npm's openai and the AI SDK.
import assert from "node:assert/strict";
import { afterEach, test } from "node:test";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, Output, streamObject, tool } from "ai";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";
import { checkIdle, guarded, open } from "./server.mjs";

const weather = z.object({
  city: z.enum(["Oslo", "Rome"]),
  sky: z.enum(["sunny", "rainy", "snowy"]),
  is_cold: z.boolean(),
});
const prompt = "It snows in Oslo. Tell the weather as JSON.";
const compatible = (server) =>
  createOpenAICompatible({
    name: "octavo",
    baseURL: server.baseURL,
    apiKey: server.apiKey,
    supportsStructuredOutputs: true,
  })(server.model);
const providers = {
  "openai-compatible": compatible(open),
  openai: createOpenAI({ baseURL: open.baseURL, apiKey: open.apiKey }).chat(open.model),
};

afterEach(() => Promise.all([checkIdle(open), checkIdle(guarded)]));

test("openai: an answer is parsed", async () => {
  const client = new OpenAI({ baseURL: open.baseURL, apiKey: open.apiKey, maxRetries: 0 });
  const asked = {
    model: open.model,
    messages: [{ role: "user", content: prompt }],
    response_format: zodResponseFormat(weather, "weather"),
  };
  const whole = await client.chat.completions.parse(asked);
  weather.parse(whole.choices[0].message.parsed);
  const streamed = await client.chat.completions.stream(asked).finalChatCompletion();
  weather.parse(streamed.choices[0].message.parsed);
});

for (const [name, model] of Object.entries(providers)) {
  test(`${name}: objects, whole and streamed`, async () => {
    const asked = { model, prompt, schema: weather, maxRetries: 0 };
    weather.parse((await generateObject(asked)).object);
    const stream = streamObject(asked);
    let last;
    for await (const partial of stream.partialObjectStream) last = partial;
    assert.deepEqual(weather.parse(await stream.object), last);
    const output = Output.object({ schema: weather });
    weather.parse((await generateText({ model, prompt, output, maxRetries: 0 })).output);
  });
}

test("a tool that must be called", async () => {
  const tools = { tell: tool({ description: "Tell the weather.", inputSchema: weather }) };
  for (const toolChoice of ["required", { type: "tool", toolName: "tell" }]) {
    const { toolCalls } = await generateText({
      model: compatible(guarded),
      prompt,
      tools,
      toolChoice,
      maxRetries: 0,
    });
    assert.equal(toolCalls[0].toolName, "tell");
    weather.parse(toolCalls[0].input);
  }
});
