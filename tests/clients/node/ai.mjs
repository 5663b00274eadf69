// The AI SDK with its two providers that fit, against the real daemon (see test_node.py).
import assert from "node:assert/strict";
import { afterEach, test } from "node:test";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, embed, generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";
import { checkIdle, guarded, open, question, whileFull } from "./server.mjs";

const compatible = (server, apiKey = server.apiKey) =>
  createOpenAICompatible({ name: "octavo", baseURL: server.baseURL, apiKey, includeUsage: true });
const official = createOpenAI({ baseURL: open.baseURL, apiKey: open.apiKey });
const providers = {
  "openai-compatible": compatible(open)(open.model),
  openai: official.chat(open.model),
};
const greedy = { temperature: 0, maxOutputTokens: 24, maxRetries: 0 };

afterEach(() => Promise.all([checkIdle(open), checkIdle(guarded)]));

for (const [name, model] of Object.entries(providers)) {
  test(`${name}: a chat streams and says the same as unstreamed`, async () => {
    const whole = await generateText({ ...greedy, model, messages: question });
    assert.match(whole.text, /Tokyo/);
    assert.equal(whole.finishReason, "stop");
    const stream = streamText({ ...greedy, model, messages: question });
    const pieces = [];
    for await (const piece of stream.textStream) pieces.push(piece);
    // The first token comes alone; drafts may bring all others at a time.
    assert.ok(pieces.length > 1);
    assert.equal(pieces.join(""), whole.text);
    const usage = await stream.usage;
    assert.equal(usage.outputTokens, whole.usage.outputTokens);
    assert.ok(usage.cachedInputTokens > whole.usage.inputTokens - 17);
    assert.equal(await stream.finishReason, "stop");
  });

  test(`${name}: a conversation, stop and length`, async () => {
    const messages = [
      ...question,
      { role: "assistant", content: [{ type: "text", text: "The capital of Japan is Tokyo." }] },
      { role: "user", content: [{ type: "text", text: "And of Italy?" }] },
    ];
    const system = "You are brief.";
    assert.match((await generateText({ ...greedy, model, system, messages })).text, /Rome/);
    const stopped = await generateText({
      ...greedy,
      model,
      messages: question,
      stopSequences: ["Tokyo"],
    });
    assert.ok(!stopped.text.includes("Tokyo"));
    const cut = await generateText({ ...greedy, model, messages: question, maxOutputTokens: 3 });
    assert.equal(cut.finishReason, "length");
    assert.equal(cut.usage.outputTokens, 3);
  });

  test(`${name}: faults come as the client's own classes`, async () => {
    const fault = (pattern) => (error) => {
      assert.ok(APICallError.isInstance(error), error);
      assert.equal(error.isRetryable, false);
      return pattern.test(error.message);
    };
    await assert.rejects(
      generateText({ ...greedy, model, messages: question, temperature: 9 }),
      fault(/temperature/),
    );
    await assert.rejects(
      generateText({ ...greedy, model, prompt: "word ".repeat(9000) }),
      fault(/8192 tokens.*has 90\d\d/),
    );
  });
}

test("completions", async () => {
  for (const model of [compatible(open).completionModel(open.model), official.completion(open.model)]) {
    const { text } = await generateText({ ...greedy, model, prompt: "1, 2, 3, 4," });
    assert.ok(text.length > 0);
  }
});

test("tools there and back, by the client's own loop", async () => {
  const asked = {
    ...greedy,
    maxOutputTokens: 40,
    model: compatible(guarded)(guarded.model),
    prompt: "What is the weather in Oslo?",
    stopWhen: stepCountIs(3),
    tools: {
      get_weather: tool({
        description: "Tell the weather in a city.",
        inputSchema: z.object({ city: z.string() }),
        execute: async ({ city }) => (city === "Oslo" ? "snowy" : "sunny"),
      }),
    },
  };
  const whole = await generateText(asked);
  assert.deepEqual(whole.steps[0].toolCalls.map((call) => call.input), [{ city: "Oslo" }]);
  assert.match(whole.text, /snow/);
  const stream = streamText(asked);
  await stream.consumeStream();
  assert.deepEqual((await stream.steps)[0].toolCalls.map((call) => call.input), [{ city: "Oslo" }]);
  assert.match(await stream.text, /snow/);
});

test("an unknown model, a wrong key, no embeddings, a full queue", async () => {
  const status = (code, retryable = false) => (error) => {
    assert.ok(APICallError.isInstance(error), error);
    assert.equal(error.isRetryable, retryable);
    return error.statusCode === code;
  };
  const ask = (model) => generateText({ ...greedy, model, messages: question });
  await assert.rejects(ask(compatible(open)("gpt-x")), status(404));
  await assert.rejects(ask(compatible(guarded, "wrong")(guarded.model)), status(401));
  await assert.rejects(
    embed({ model: compatible(open).embeddingModel(open.model), value: "x", maxRetries: 0 }),
    status(404),
  );
  await whileFull(() =>
    assert.rejects(ask(compatible(guarded)(guarded.model)), status(429, true)),
  );
});

test("sixteen at once", async () => {
  const model = providers["openai-compatible"];
  const answers = await Promise.all(
    Array.from({ length: 16 }, (_, i) =>
      generateText({ ...greedy, maxOutputTokens: 8, model, prompt: `What is ${i} + 1?` }),
    ),
  );
  assert.ok(answers.every((answer) => answer.text.length > 0));
});

test("leaving a stream frees what it held", async () => {
  const leaving = new AbortController();
  const stream = streamText({
    ...greedy,
    maxOutputTokens: 8000,
    model: providers["openai-compatible"],
    prompt: "Tell me a long story.",
    providerOptions: { octavo: { ignore_eos: true } },
    abortSignal: leaving.signal,
  });
  for await (const _ of stream.textStream) {
    leaving.abort();
    break;
  }
  await checkIdle(open);
});
