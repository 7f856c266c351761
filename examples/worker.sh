#!/usr/bin/env bash
# A leaseq worker in shell: bash 4 or newer, curl, jq. Its work: digest a file.
#
# Copy it and put your own work in the place of `digest`; the rest stays as it is.
# Environment: LEASEQ_URL, LEASEQ_QUEUE, LEASEQ_WORKER, LEASEQ_LEASE_SECONDS.
set -u

url=${LEASEQ_URL:-http://127.0.0.1:8080}
queue=${LEASEQ_QUEUE:-files}
worker=${LEASEQ_WORKER:-shell-$$}
lease_seconds=${LEASEQ_LEASE_SECONDS:-30}
wait_seconds=20

log() { printf '%s %s\n' "$worker" "$*" >&2; }

# The same few lines in every language: file(1) answers differently from machine to machine,
# and a retry may land on a worker in another language.
media_type() {
    case $1 in
        *.py) echo text/x-python ;;
        *.txt) echo text/plain ;;
        *.html) echo text/html ;;
        *.xml) echo application/xml ;;
        *.json) echo application/json ;;
        *.c | *.h) echo text/x-c ;;
        *.so) echo application/x-sharedlib ;;
        *.png) echo image/png ;;
        *) echo application/octet-stream ;;
    esac
}

# The work: prints SHA-256, size in bytes, number of newlines and media type of the file $1.
# Data reaches jq as arguments only, never as part of a program or of JSON text.
digest() {
    local sha256 lines size
    sha256=$(sha256sum < "$1") && read -r lines size < <(wc -lc < "$1") || return
    jq -n --arg sha256 "${sha256%% *}" --argjson size "$size" --argjson lines "$lines" \
        --arg media_type "$(media_type "$1")" \
        '{result: {$sha256, $size, $lines, $media_type, language: "shell"}}'
}

# Why the file $1 cannot be read, by the name that the other languages use.
failure() {
    local type=EIO
    if [ -d "$1" ]; then type=EISDIR; elif [ ! -e "$1" ]; then type=ENOENT; elif [ ! -r "$1" ]; then type=EACCES; fi
    jq -n --arg type "$type" --arg message "$2" '{error: {$type, $message}}'
}

# POSTs the JSON on standard input to $1, leaves the answer in the file $2 and prints the HTTP status, 000 for none.
# curl itself tries again when nobody answers and at 429 and 5xx, with growing pauses or as Retry-After says.
# Safe for ack and fail: a repeat with the same lease changes nothing and gets the same answer.
# Call it in a subshell: exec makes the subshell curl, so that a signal to the one reaches the other.
post() {
    exec curl --silent --show-error --max-time $((wait_seconds + 10)) --retry 6 --retry-all-errors "${@:3}" \
        --header 'Content-Type: application/json' --data-binary @- --output "$2" --write-out '%{http_code}' "${url%/}$1"
}

# Extends lease $2 of job $1 until standard input ends.
heartbeats() {
    while read -r -t "$beat_seconds"; [ $? -gt 128 ]; do
        jq -n --arg lease_id "$2" '{$lease_id}' | post "/jobs/$1/heartbeat" "$tmp/heartbeat" --retry 0 > /dev/null
    done
}

# Does the leased job in the file $1, if there is one, and tells the service how it went.
handle() {
    local id lease_id path verb=ack message status working
    # NUL ends the fields, because a path may hold anything else, newlines at its end too.
    { IFS= read -r -d '' id && IFS= read -r -d '' lease_id && IFS= read -r -d '' path; } \
        < <(jq -j '.jobs[] | .id, .lease_id, .payload.path | . + "\u0000"' "$1") || return

    exec {working}> >(heartbeats "$id" "$lease_id")
    if ! message=$(digest "$path" 2>&1 > "$tmp/outcome"); then
        verb=fail
        failure "$path" "$message" > "$tmp/outcome"
    fi
    exec {working}>&-

    status=$(jq --arg lease_id "$lease_id" '. + {$lease_id}' "$tmp/outcome" | post "/jobs/$id/$verb" "$tmp/answer")
    case $status in
        200) log "$verb $id" ;;
        # 409 lease_lost: the job is another worker's by now, or nobody's; its result is not ours.
        *) log "$verb $id dropped: $status $(cat "$tmp/answer")" ;;
    esac
}

tmp=$(mktemp -d) || exit
trap 'rm -rf "$tmp"' EXIT

# SIGTERM and Ctrl-C: leave now if no job is in hand, else after it. A second signal ends the script at once.
leaving='' polling=''
trap 'trap - INT TERM; leaving=1; [ -z "$polling" ] || kill "$polling"' INT TERM

beat_seconds=$(jq -n "$lease_seconds / 3")
wish=$(jq -n --arg queue "$queue" --arg worker "$worker" --arg wait "$wait_seconds" --arg lease "$lease_seconds" \
    '{queues: [$queue], types: ["file-digest"], $worker, wait_seconds: $wait | tonumber, lease_seconds: $lease | tonumber}')

while [ -z "$leaving" ]; do
    # In the background, because bash hears a signal while it waits, but not while curl runs in the foreground.
    post /lease "$tmp/jobs" <<< "$wish" > "$tmp/status" &
    polling=$!
    [ -z "$leaving" ] || kill "$polling"
    wait "$polling"
    polling=''
    case $(cat "$tmp/status") in
        200) (trap '' INT TERM; handle "$tmp/jobs") ;;
        408 | 429) ;;
        4??) log "lease: $(cat "$tmp/jobs")"; exit 1 ;;
    esac
done
