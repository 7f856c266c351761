-- Load for wrk: -- MODE QUEUE BATCH, the mode one of
--   enqueue   one job a request
--   work      lease BATCH jobs; then an ack for each
--   settle    lease BATCH jobs and settle, in the same request, those of an earlier one
--   life      enqueue BATCH jobs in one request, then settle, in turn
-- request() is not told which connection it is for: what a reply leased goes on a stack, and whichever request of
-- this thread is next takes it from there.
local threads = {}
local leased = {}
jobs, empty = 0, 0

function setup(thread)
  threads[#threads + 1] = thread
end

local function keep(body)
  local pairs_of_reply = {}
  for id, lease_id in body:gmatch('{"id":"([%x-]+)".-"lease_id":"([%x-]+)"') do
    pairs_of_reply[#pairs_of_reply + 1] = { id, lease_id }
  end
  if #pairs_of_reply == 0 then empty = empty + 1 end
  return pairs_of_reply
end

function init(args)
  local mode, queue, batch = args[1], args[2], args[3]
  wrk.method = "POST"
  wrk.headers["Content-Type"] = "application/json"
  local lease = string.format('"queues":["%s"],"max_jobs":%s,"wait_seconds":0,"worker":"bench"', queue, batch)

  if mode == "enqueue" then
    wrk.body = string.format('{"queue":"%s","payload":{"to":"a@example.com","n":1}}', queue)

  elseif mode == "work" then
    local lease_request = wrk.format("POST", "/lease", nil, "{" .. lease .. "}")
    function request()
      local pair = table.remove(leased)
      if pair == nil then return lease_request end
      return wrk.format("POST", "/jobs/" .. pair[1] .. "/ack", nil, '{"lease_id":"' .. pair[2] .. '"}')
    end
    function response(status, _, body)
      if body:sub(1, 8) == '{"jobs":' then
        for _, pair in ipairs(keep(body)) do leased[#leased + 1] = pair end
      elseif status == 200 then
        jobs = jobs + 1
      end
    end

  elseif mode == "settle" or mode == "life" then
    local job = string.format('{"queue":"%s","payload":{"to":"a@example.com","n":1}}', queue)
    local enqueue = wrk.format("POST", "/jobs/batch", nil, '{"jobs":[' .. job .. ("," .. job):rep(batch - 1) .. "]}")
    local enqueues = false
    function request()
      enqueues = mode == "life" and not enqueues
      if enqueues then return enqueue end
      local reply = table.remove(leased)
      if reply == nil then return wrk.format("POST", "/lease", nil, "{" .. lease .. "}") end
      local items = {}
      for place, pair in ipairs(reply) do
        items[place] = '{"job_id":"' .. pair[1] .. '","lease_id":"' .. pair[2] .. '","outcome":"ack"}'
      end
      return wrk.format("POST", "/lease", nil, "{" .. lease .. ',"settle":[' .. table.concat(items, ",") .. "]}")
    end
    function response(_, _, body)
      if body:sub(1, 8) ~= '{"jobs":' then return end
      local _, settled = body:gsub('"state":"completed"', "")
      jobs = jobs + settled
      local reply = keep(body)
      if #reply > 0 then leased[#leased + 1] = reply end
    end
  end
end

function done(summary, latency)
  local all_jobs, all_empty, errors = 0, 0, 0
  for _, thread in ipairs(threads) do
    all_jobs, all_empty = all_jobs + thread:get("jobs"), all_empty + thread:get("empty")
  end
  for _, count in pairs(summary.errors) do errors = errors + count end
  io.write(string.format(
    '{"jobs":%d,"requests":%d,"seconds":%f,"empty":%d,"errors":%d,"p50_ms":%f,"p99_ms":%f}\n',
    all_jobs, summary.requests, summary.duration / 1e6, all_empty, errors,
    latency:percentile(50) / 1000, latency:percentile(99) / 1000))
end
