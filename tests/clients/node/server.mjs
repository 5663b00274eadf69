// The servers that the suites talk to, by the variables that conftest.py sets.
import assert from "node:assert/strict";

export const open = {
  url: process.env.SUITE_URL,
  baseURL: `${process.env.SUITE_URL}/v1`,
  apiKey: "none",
  model: process.env.SUITE_MODEL,
};
export const guarded = {
  url: process.env.SUITE_GUARDED_URL,
  baseURL: `${process.env.SUITE_GUARDED_URL}/v1`,
  apiKey: process.env.SUITE_GUARDED_KEY,
  model: process.env.SUITE_GUARDED_MODEL,
};

export const question = [{ role: "user", content: "What is the capital of Japan?" }];

const timeoutMs = 600_000;

// Values of gauges, summed over their labels: { num_requests_running: 1, ... }.
async function gauges(server, names) {
  const text = await (await fetch(`${server.url}/metrics`)).text();
  return names.map((name) => {
    const [bare, state] = name.split(".");
    const lines = text
      .split("\n")
      .filter((line) => line.startsWith(`octavo_${bare}{`) || line.startsWith(`octavo_${bare} `))
      .filter((line) => !state || line.includes(`state="${state}"`));
    assert.ok(lines.length, `no gauge ${name}`);
    return lines.reduce((sum, line) => sum + Number(line.split(" ").at(-1)), 0);
  });
}

async function waitFor(server, running, waiting) {
  const deadline = performance.now() + timeoutMs;
  for (;;) {
    const seen = await gauges(server, ["num_requests_running", "num_requests_waiting"]);
    if (seen[0] === running && seen[1] === waiting) return;
    assert.ok(performance.now() < deadline, `running and waiting: ${seen}`);
  }
}

// Soon nothing runs or waits, and then no page is anybody's.
export async function checkIdle(server) {
  await waitFor(server, 0, 0);
  const held = await gauges(server, ["kv_cache_pages.private", "kv_cache_pages.leased"]);
  assert.deepEqual(held, [0, 0]);
}

// Does `work` while the guarded server is busy and its queue is full.
export async function whileFull(work) {
  await checkIdle(guarded);
  const leaving = new AbortController();
  const busy = [];
  try {
    for (const waiting of [0, 1]) {
      const asked = fetch(`${guarded.baseURL}/chat/completions`, {
        method: "POST",
        headers: {
          authorization: `Bearer ${guarded.apiKey}`,
          "content-type": "application/json",
        },
        // Without max_tokens, so that it goes on for as long as the context has room.
        body: JSON.stringify({ messages: question, ignore_eos: true, stream: true }),
        signal: leaving.signal,
      });
      busy.push(asked.then((answer) => answer.text()).catch(() => {}));
      await waitFor(guarded, 1, waiting);
    }
    await work();
  } finally {
    leaving.abort();
    await Promise.all(busy);
  }
}
