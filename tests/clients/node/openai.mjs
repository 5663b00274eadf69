// npm's openai, against the real daemon (see test_node.py).
import assert from "node:assert/strict";
import { afterEach, test } from "node:test";
import OpenAI from "openai";
import { checkIdle, guarded, open, question, whileFull } from "./server.mjs";

const client = new OpenAI({ baseURL: open.baseURL, apiKey: open.apiKey, maxRetries: 0 });
const guardedClient = new OpenAI({
  baseURL: guarded.baseURL,
  apiKey: guarded.apiKey,
  maxRetries: 0,
});
const greedy = { model: open.model, messages: question, temperature: 0, max_tokens: 24 };
const weather = {
  type: "function",
  function: {
    name: "get_weather",
    parameters: { type: "object", properties: { city: { type: "string" } } },
  },
};

async function all(stream) {
  const found = [];
  for await (const one of stream) found.push(one);
  return found;
}

afterEach(() => Promise.all([checkIdle(open), checkIdle(guarded)]));

test("the model is listed and found", async () => {
  const models = await all(client.models.list());
  assert.deepEqual(models.map((model) => model.id), [open.model]);
  assert.equal((await client.models.retrieve(open.model)).id, open.model);
});

test("a chat streams and says the same as unstreamed", async () => {
  const whole = await client.chat.completions.create(greedy);
  const chunks = await all(
    await client.chat.completions.create({
      ...greedy,
      stream: true,
      stream_options: { include_usage: true },
    }),
  );
  const text = chunks.map((chunk) => chunk.choices[0]?.delta.content ?? "").join("");
  assert.match(text, /Tokyo/);
  assert.equal(text, whole.choices[0].message.content);
  assert.equal(whole.choices[0].finish_reason, "stop");
  const { usage } = chunks.at(-1);
  assert.equal(usage.completion_tokens, whole.usage.completion_tokens);
  assert.ok(usage.prompt_tokens_details.cached_tokens > whole.usage.prompt_tokens - 17);
});

test("the client's own stream helper reads it", async () => {
  const stream = client.chat.completions.stream(greedy);
  let deltas = "";
  stream.on("content", (delta) => (deltas += delta));
  assert.equal(deltas, "");
  assert.equal(await stream.finalContent(), deltas);
  assert.match(deltas, /Tokyo/);
});

test("n, stop, length, logprobs", async () => {
  const several = await client.chat.completions.create({ ...greedy, n: 3, temperature: 2 });
  assert.ok(new Set(several.choices.map((choice) => choice.message.content)).size > 1);
  const stopped = await client.chat.completions.create({ ...greedy, stop: "Tokyo" });
  assert.ok(!stopped.choices[0].message.content.includes("Tokyo"));
  const cut = await client.chat.completions.create({ ...greedy, max_tokens: 3 });
  assert.equal(cut.choices[0].finish_reason, "length");
  const detailed = await client.chat.completions.create({
    ...greedy,
    logprobs: true,
    top_logprobs: 2,
  });
  const tokens = detailed.choices[0].logprobs.content;
  assert.ok(tokens.every((token) => token.top_logprobs.length === 2));
});

test("characters of several tokens arrive whole", async () => {
  const line = "👩‍🚀 naïve 漢字 🇫🇷 Ωμέγα\n";
  const asked = { model: open.model, prompt: line.repeat(6), max_tokens: 40, temperature: 0 };
  const whole = (await client.completions.create(asked)).choices[0].text;
  const chunks = await all(await client.completions.create({ ...asked, stream: true }));
  assert.ok(whole.startsWith(line), whole);
  assert.equal(chunks.map((chunk) => chunk.choices[0].text).join(""), whole);
});

test("tools there and back", async () => {
  const messages = [{ role: "user", content: "What is the weather in Oslo?" }];
  const asked = { model: guarded.model, tools: [weather], temperature: 0, max_tokens: 40 };
  const [choice] = (await guardedClient.chat.completions.create({ ...asked, messages })).choices;
  assert.equal(choice.finish_reason, "tool_calls");
  assert.deepEqual(JSON.parse(choice.message.tool_calls[0].function.arguments), { city: "Oslo" });
  const runner = guardedClient.chat.completions.runTools({
    ...asked,
    messages,
    stream: true,
    tools: [
      {
        type: "function",
        function: {
          ...weather.function,
          parse: JSON.parse,
          function: ({ city }) => (city === "Oslo" ? "snowy" : "sunny"),
        },
      },
    ],
  });
  assert.match(await runner.finalContent(), /snow/);
});

test("faults come as the client's own classes", async () => {
  const { completions } = client.chat;
  await assert.rejects(completions.create({ ...greedy, temperature: 9 }), (error) => {
    assert.ok(error instanceof OpenAI.BadRequestError);
    return error.param === "temperature";
  });
  await assert.rejects(completions.create({ ...greedy, model: "gpt-x" }), OpenAI.NotFoundError);
  const long = [{ role: "user", content: "word ".repeat(9000) }];
  await assert.rejects(completions.create({ ...greedy, messages: long }), (error) => {
    assert.equal(error.code, "context_length_exceeded");
    return /8192 tokens.*has 90\d\d/.test(error.message);
  });
  await assert.rejects(
    client.embeddings.create({ model: open.model, input: "x" }),
    OpenAI.NotFoundError,
  );
  await assert.rejects(
    guardedClient.withOptions({ apiKey: "wrong" }).models.list(),
    OpenAI.AuthenticationError,
  );
});

test("a full queue is told", async () => {
  await whileFull(() =>
    assert.rejects(
      guardedClient.chat.completions.create({ ...greedy, model: guarded.model }),
      (error) => {
        assert.ok(error instanceof OpenAI.RateLimitError);
        return Number(error.headers.get("retry-after")) >= 1;
      },
    ),
  );
});

test("sixteen at once each get their own answer", async () => {
  const starts = Array.from({ length: 16 }, (_, i) => 10 * (i + 1));
  const texts = await Promise.all(
    starts.map(async (start) => {
      const prompt = Array.from({ length: 5 }, (_, i) => `${start + i},`).join(" ");
      const asked = { model: open.model, prompt, max_tokens: 12, temperature: 0, stream: true };
      const chunks = await all(await client.completions.create(asked));
      return chunks.map((chunk) => chunk.choices[0].text).join("");
    }),
  );
  starts.forEach((start, i) => assert.ok(texts[i].startsWith(` ${start + 5},`), texts[i]));
});

test("leaving a stream, and a timeout, free what they held", async () => {
  const endless = { model: open.model, prompt: "Once", max_tokens: 8000, ignore_eos: true };
  const stream = await client.completions.create({ ...endless, stream: true });
  for await (const _ of stream) break;
  await checkIdle(open);
  await assert.rejects(
    client.completions.create(endless, { timeout: 300 }),
    OpenAI.APIConnectionTimeoutError,
  );
});
