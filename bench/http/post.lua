-- POSTs the pictures of a folder in turn; prints what wrk measured as one line of JSON.
-- Arguments: how many bodies, their content type, the folder with files 0, 1, ..., and perhaps the
-- name and value of one more header.
-- NEW_SEED in the path becomes a number that no request had before, in this run or an earlier one.

local requests, turn = {}, 0
local seeded, seed = wrk.path:find("NEW_SEED"), os.time() * 1000000

function init(args)
   local headers = { ["Content-Type"] = args[2] }
   if args[4] then headers[args[4]] = args[5] end
   for i = 0, tonumber(args[1]) - 1 do
      local file = assert(io.open(args[3] .. "/" .. i, "rb"))
      requests[i] = wrk.format("POST", nil, headers, file:read("*a"))
      file:close()
   end
end

function request()
   turn = (turn + 1) % (#requests + 1)
   if not seeded then return requests[turn] end
   seed = seed + 1
   return (requests[turn]:gsub("NEW_SEED", string.format("%d", seed), 1))
end

function done(summary, latency)
   local e = summary.errors
   io.write(string.format(
      '\n{"requests": %d, "microseconds": %d, "p50_us": %d, "p99_us": %d, "refused": %d, "broken": %d}\n',
      summary.requests, summary.duration, latency:percentile(50), latency:percentile(99),
      e.status, e.connect + e.read + e.write + e.timeout))
end
