import { Queue, Worker } from "bullmq";

import { answer, payload, repeat, wanted, watch } from "./protocol.mjs";

const CHUNK = 1000;
const connection = { url: wanted.url, maxRetriesPerRequest: null };
const queue = new Queue(wanted.queue, { connection });

async function fill() {
  for (let left = wanted.count; left > 0; left -= CHUNK) {
    await queue.addBulk(Array.from({ length: Math.min(left, CHUNK) }, () => ({ name: "bench", data: payload })));
  }
}

await answer({
  send: () => repeat(async () => ((await queue.add("bench", payload)) ? 1 : 0)),
  take: async () => {
    await fill();
    return watch(
      (done) => new Worker(queue.name, async () => done(), { connection, concurrency: wanted.concurrency }),
    );
  },
});
