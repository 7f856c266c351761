import { PgBoss } from "pg-boss";

import { answer, paced, payload, repeat, wanted } from "./protocol.mjs";

const CHUNK = 1000;
const { queue, batch } = wanted;

const boss = new PgBoss(wanted.url); // a pool of 10, as it comes
boss.on("error", (error) => console.error(error));
await boss.start();
await boss.createQueue(queue);

async function take() {
  const jobs = await boss.fetch(queue, { batchSize: batch });
  if (jobs.length > 0) await boss.complete(queue, jobs.map((job) => job.id));
  return jobs.length;
}

async function live() {
  await boss.insert(queue, Array.from({ length: batch }, () => ({ data: payload })));
  return take();
}

async function life() {
  await boss.send(queue, payload);
  const began = performance.now();
  const [job] = await boss.fetch(queue);
  const milliseconds = performance.now() - began;
  if (job) await boss.complete(queue, job.id);
  return milliseconds;
}

async function fill() {
  let left = wanted.count;
  const loop = async () => {
    while (left > 0) {
      const count = Math.min(left, CHUNK);
      left -= count;
      await boss.insert(queue, Array.from({ length: count }, () => ({ data: payload })));
    }
  };
  await Promise.all([loop(), loop(), loop(), loop()]);
  return { jobs: wanted.count, seconds: 0, cpu_seconds: 0 };
}

await answer({
  fill,
  send: () => repeat(async () => ((await boss.send(queue, payload)) ? 1 : 0)),
  take: () => repeat(take),
  live: () => repeat(live),
  traffic: () => paced(life),
});
