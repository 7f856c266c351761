import { Logger, makeWorkerUtils, run } from "graphile-worker";

import { answer, payload, repeat, sleep, wanted, watch } from "./protocol.mjs";

const connectionString = wanted.url;
const logger = new Logger(() => () => {});
const utils = await makeWorkerUtils({ connectionString, logger });
await utils.migrate();

function work(task, concurrency) {
  return run({ connectionString, logger, concurrency, noHandleSignals: true, taskList: { bench: task } });
}

function fill() {
  return utils.withPgClient((client) =>
    client.query(
      `SELECT count(*) FROM graphile_worker.add_jobs(ARRAY(
         SELECT json_populate_record(null::graphile_worker.job_spec,
                                     json_build_object('identifier', 'bench', 'payload', $1::json))
           FROM generate_series(1, $2::int)))`,
      [payload, wanted.count],
    ),
  );
}

/** From the call that adds a job to the start of its task, in an idle system, one after the other. */
async function pickUp() {
  let started;
  await work(() => started(performance.now()), 1);
  const latencies = [];
  for (let n = 0; n < wanted.count; n++) {
    await sleep(wanted.pause_ms);
    const start = new Promise((resolve) => (started = resolve));
    const began = performance.now();
    await utils.addJob("bench", payload);
    latencies.push((await start) - began);
  }
  return { jobs: wanted.count, seconds: 0, latencies };
}

await answer({
  send: () => repeat(async () => ((await utils.addJob("bench", payload)) ? 1 : 0)),
  take: async () => {
    await fill();
    return watch((done) => work(async () => done(), wanted.concurrency));
  },
  pick_up: pickUp,
});
