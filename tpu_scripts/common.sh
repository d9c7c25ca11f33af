# What the scripts here share: settings, messages, and the few things asked of Google Cloud. Sourced, never run.
# It keeps to what the bash 3.2 of a Mac knows. `--dry-run` prints every command that would be run, and runs none.
# shellcheck shell=bash

set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
verb=${0##*/}
dry="" arguments=("$verb") out="" why="" state="" chips="" partial=""
tmp=$(mktemp -d "${TMPDIR:-/tmp}/bigflax-tpu.XXXXXX")
tidy() {
    local child
    rm -rf "$tmp"
    for child in $(jobs -p); do kill "$child" 2>/dev/null || true; done # a signal may come before anything could note what sleeps
}
trap tidy EXIT
exec 5>&2 # a signal may come while standard error goes to a file
trap 'interrupted >&5; exit 130' INT TERM HUP

say() { printf '%s%s\n' "${dry:+# }" "$*"; }
fail() { printf '%s: %s\n' "$verb" "$1" >&2; exit "${2:-1}"; } # a mistake of whoever called is 2
interrupted() { billed "interrupted"; }
billed() { # WORDS: what to know where a slice is left behind
    local how="may be there and is then"
    [ "$state" != ACTIVE ] || how="is there and"
    echo "$verb: $1; $TPU_NAME ($chips chips of ${TOPOLOGY%%:*}) $how billed: tpu_scripts/delete ends that"
}
pause() { # SECONDS, in the background, so that a signal need not wait for their end
    [ -z "$dry" ] || return 0
    sleep "$1" 7>&- &
    wait $!
}

quoted() { # WORD...: one line that a shell reads as these words
    local word line="" single="'" escaped="'\\''"
    for word; do
        case $word in
            "" | *[!A-Za-z0-9_./:=,@%+-]*) line+=" '${word//$single/$escaped}'" ;;
            *) line+=" $word" ;;
        esac
    done
    echo "${line# }"
}

# --- the command line: --help and --dry-run are ours, the rest is left in arguments[1...]
for word; do
    case $word in
        -h | --help) sed -n '/^#!/d; /^#/!q; s/^# \{0,1\}//p' "$0"; exit 0 ;;
        --dry-run) dry=1 ;;
        *) arguments+=("$word") ;;
    esac
done
none_left() { [ ${#arguments[@]} = 1 ] || fail "takes no argument ${arguments[1]}; tpu_scripts/$verb --help says what it takes" 2; }

# --- settings: settings.sh, over it the file SETTINGS, over both the environment
load_settings() {
    local name names kept=("")
    names=$(sed -n 's/^\([A-Z_]*\)=.*/\1/p' "$here/settings.sh")
    for name in $names; do [ -z "${!name+set}" ] || kept+=("$name=${!name}"); done
    # shellcheck source=tpu_scripts/settings.sh
    source "$here/settings.sh"
    if [ -n "${SETTINGS:-}" ]; then
        [ -f "$SETTINGS" ] || fail "SETTINGS=$SETTINGS is no file" 2
        case $SETTINGS in */*) ;; *) SETTINGS=./$SETTINGS ;; esac # without a slash bash would look along PATH
        # shellcheck disable=SC1090
        source "$SETTINGS"
    fi
    for name in "${kept[@]}"; do [ -z "$name" ] || printf -v "${name%%=*}" '%s' "${name#*=}"; done
}

check_settings() { # also sets accelerator, chips (of all slices) and folder
    local generation=${TOPOLOGY%%:*} sides=${TOPOLOGY#*:} side
    [[ $TPU_NAME =~ ^[a-z]([-a-z0-9]{0,37}[a-z0-9])?$ ]] ||
        fail "TPU_NAME=$TPU_NAME is no name: at most 39 small letters, digits and dashes, a letter first and no dash last" 2
    [[ $TOPOLOGY =~ ^[a-z0-9]+:[0-9]+(x[0-9]+)+$ ]] || fail "TOPOLOGY=$TOPOLOGY is none; write GENERATION:AxB or GENERATION:AxBxC, such as v5e:4x4 or v5p:4x4x4" 2
    chips=1
    for side in ${sides//x/ }; do chips=$((chips * 10#$side)); done
    case $generation in # what Cloud TPU calls it (cores for v4, v5p and tpu7x, chips for v5e and v6e), and the image
        v4) accelerator=v4-$((2 * chips)) image=tpu-ubuntu2204-base ;;
        v5e) accelerator=v5litepod-$chips image=v2-alpha-tpuv5-lite ;;
        v5p) accelerator=v5p-$((2 * chips)) image=v2-alpha-tpuv5 ;;
        v6e) accelerator=v6e-$chips image=v2-alpha-tpuv6e ;;
        tpu7x) accelerator=tpu7x-$((2 * chips)) image=v2-alpha-tpu7-ubuntu2404 ;;
        *) fail "TOPOLOGY=$TOPOLOGY is of no generation known here; there are v4, v5e, v5p, v6e and tpu7x" 2 ;;
    esac
    RUNTIME=${RUNTIME:-$image}
    [[ $SLICES =~ ^[1-9][0-9]*$ ]] || fail "SLICES=$SLICES is no number of slices; give 1 or more" 2
    case $PROVISIONING in spot | on-demand | reserved) ;; *) fail "PROVISIONING=$PROVISIONING is unknown; there are spot, on-demand and reserved" 2 ;; esac
    case $WHEN_OVER in keep | delete) ;; *) fail "WHEN_OVER=$WHEN_OVER is unknown; there are keep and delete" 2 ;; esac
    [[ $BUCKET =~ ^gs://[a-z0-9][-_.a-z0-9]+(/[-_.A-Za-z0-9]+)*/?$ ]] ||
        fail "BUCKET=$BUCKET is no bucket; set BUCKET=gs://NAME in tpu_scripts/settings.sh or in the environment" 2
    for side in WAIT_HOURS POLL_SECONDS LOG_SECONDS RETRIES; do
        [[ ${!side} =~ ^[0-9]+$ ]] || fail "$side=${!side} is no whole number" 2
    done
    BUCKET=${BUCKET%/} folder=${BUCKET%/}/$TPU_NAME
    chips=$((chips * SLICES))
}

# --- Google Cloud
cloud() { # ARGUMENT...: gcloud's status; what it printed is in $out, one sentence about a failure in $why
    local command=(gcloud "$@" --quiet) status=0
    [ -z "$PROJECT" ] || command+=("--project=$PROJECT")
    out="" why=""
    if [ -n "$dry" ]; then quoted "${command[@]}"; return; fi
    command -v gcloud >/dev/null || fail "gcloud is not installed: https://cloud.google.com/sdk/docs/install"
    limited "${limit:-600}" "${command[@]}" </dev/null >"$tmp/out" 2>"$tmp/err" 7>&- || status=$? # 7 is the lock of watch
    out=$(<"$tmp/out")
    [ $status = 0 ] || why=$(explain "$status" <"$tmp/err")
    return $status
}
call() { if [ -n "$dry" ]; then quoted "$@"; else "$@"; fi; }
must() { cloud "$@" || fail "$why"; }
limited() { # SECONDS COMMAND...; a Mac has no `timeout`, and goes without a limit
    if command -v timeout >/dev/null; then timeout --foreground --kill-after=10 "$@"; else shift; "$@"; fi
}

explain() { # STATUS, gcloud's complaint on stdin: prints what to do about it
    local text last
    text=$(cat)
    last=$(grep -v '^ *$' <<<"$text" | grep -m 1 'ERROR' || grep -v '^ *$' <<<"$text" | tail -n 1 || true)
    case $text in
        *"Invalid choice"* | *"unrecognized arguments"*) echo "this gcloud is too old for queued resources: gcloud components update. It said: $last" ;;
        *"gcloud auth login"* | *"Reauthentication"* | *"invalid_grant"*) echo "gcloud is not logged in: gcloud auth login" ;;
        *"core/project"* | *"property [project]"*) echo "no project is set: PROJECT=... in tpu_scripts/settings.sh, or gcloud config set project ..." ;;
        *SERVICE_DISABLED* | *"has not been used in project"* | *"it is disabled"*) echo "the project's TPU API is off: gcloud services enable tpu.googleapis.com" ;;
        *[Qq]"uota"*) echo "the quota of the project for $accelerator ($PROVISIONING) in $ZONE does not suffice: ask for more at https://console.cloud.google.com/iam-admin/quotas, or change ZONE, TOPOLOGY or PROVISIONING. gcloud said: $last" ;;
        *"no more capacity"* | *"enough resources"* | *STOCKOUT* | *RESOURCE_EXHAUSTED*) echo "$ZONE has no free $accelerator ($PROVISIONING) now: try again later, or change ZONE or PROVISIONING. gcloud said: $last" ;;
        *PERMISSION_DENIED* | *"does not have"*"ermission"* | *"does not have"*"access"* | *" 403"*) echo "the account that gcloud uses may not do this (it needs the roles TPU Admin, Service Account User, and Storage Object Admin on $BUCKET). gcloud said: $last" ;;
        *"Reservation"* | *"reservation"*) echo "the project has no reservation of $accelerator in $ZONE: set PROVISIONING=spot or on-demand. gcloud said: $last" ;;
        *INVALID_ARGUMENT* | *"ccelerator type"* | *"untime version"*) echo "Cloud TPU does not accept ZONE=$ZONE, TOPOLOGY=$TOPOLOGY ($accelerator), RUNTIME=$RUNTIME together: gcloud compute tpus accelerator-types list --zone=$ZONE shows what there is. gcloud said: $last" ;;
        *"SSH agent"*) echo "your ssh-agent lacks the key that gcloud uses: ssh-add ~/.ssh/google_compute_engine" ;;
        *"matched no objects"* | *NOT_FOUND* | *" 404"* | *"not found"*) echo "not there: $last" ;;
        *) if [ "$1" = 124 ]; then echo "gcloud gave no answer within ${limit:-600} s: try again"; else echo "gcloud ended with $1: ${last:-it said nothing}"; fi ;;
    esac
}

look() { # [STATE]: sets $state to that of the queued resource, NONE where there is none; with --dry-run to STATE
    if cloud compute tpus queued-resources describe "$TPU_NAME" --zone="$ZONE" '--format=value(state.state)'; then
        state=${out:-UNKNOWN}
    elif [[ $why == "not there:"* ]]; then
        state=NONE
    else
        return 1
    fi
    [ -z "$dry" ] || state=${1:-ACTIVE}
}

preflight() { # before anything costs money
    local name=${BUCKET#gs://}
    cloud storage ls "gs://${name%%/*}" || case $why in
        *"matched no objects"*) ;; # an empty one
        "not there:"*) fail "the bucket is not there: gcloud storage buckets create gs://${name%%/*} --location=${ZONE%-*}" ;;
        *) fail "$why" ;;
    esac
}

request() { # asks for the slice; the request waits in a queue
    local flags=("--zone=$ZONE" "--accelerator-type=$accelerator" "--runtime-version=$RUNTIME" "--valid-until-duration=${WAIT_HOURS}h"
        --scopes=https://www.googleapis.com/auth/cloud-platform)
    if [ "$SLICES" = 1 ]; then flags+=("--node-id=$TPU_NAME"); else flags+=("--node-count=$SLICES" "--node-prefix=$TPU_NAME"); fi
    [ "$PROVISIONING" = on-demand ] || flags+=("--$PROVISIONING")
    cloud compute tpus queued-resources create "$TPU_NAME" "${flags[@]}" || [[ $why == *ALREADY_EXISTS* ]]
}

release() { # gives slice and request back; returns when they are gone
    limit=1800 cloud compute tpus queued-resources delete "$TPU_NAME" --zone="$ZONE" --force || [[ $why == "not there:"* ]]
}

reason() { # prints why the request failed, if Cloud TPU says so
    cloud compute tpus queued-resources describe "$TPU_NAME" --zone="$ZONE" '--format=value(state.failedData.error.message)' || true
    [ -n "$dry" ] || echo "${out:-no reason given}"
}

nodes() { # the slices' names
    if [ "$SLICES" = 1 ]; then echo "$TPU_NAME"; else seq -f "$TPU_NAME-%.0f" 0 $((SLICES - 1)); fi
}

workers() { # TEXT: a shell runs it on every worker, with NODE the name of its slice; lines in $out. A failure names who does not answer
    local node lines=""
    for node in $(nodes); do
        if ! cloud compute tpus tpu-vm ssh "$node" --zone="$ZONE" --worker=all --command="NODE=$node; $1"; then
            blame "$node" "$out" "$why"
            return 1
        fi
        lines+=$out$'\n'
    done
    out=$lines
}

blame() { # NODE WHAT-IT-PRINTED WHY: sets $why (which workers do not answer, or else what they said) and partial (some do answer)
    local node=$1 printed=$2 because=$3 index=0 count said="" silent=0
    partial=""
    cloud compute tpus tpu-vm describe "$node" --zone="$ZONE" --flatten='networkEndpoints[]' '--format=value(state,networkEndpoints.ipAddress)' || return 0
    case $out in *PREEMPTED* | *TERMINATED*) why="$node was taken away"; state=SUSPENDED; return ;; esac
    count=$(grep -c . <<<"$out")
    while [ $index -lt "$count" ]; do
        cloud compute tpus tpu-vm ssh "$node" --zone="$ZONE" --worker=$index --command=true || { said+="${said:+, }$index" silent=$((silent + 1)); }
        index=$((index + 1))
    done
    if [ -n "$said" ]; then
        # shellcheck disable=SC2034 # watch reads it
        [ "$silent" = "$count" ] || partial=1
        why="no answer over SSH from worker $said of $node, which has $count: wait a minute and try again; if it stays so, tpu_scripts/delete and tpu_scripts/create"
    else
        why=$(grep -m 1 '^bigflax: ' <<<"$printed" || echo "$because")
    fi
}

statuses() { # sets $out to one line a worker: HOST empty, HOST ready, HOST running, or HOST ended CODE
    # shellcheck disable=SC2016 # the worker expands it
    workers 'bash bigflax/worker status 2>/dev/null || echo "worker $NODE.$(hostname) empty"' || return 1
    out=$(sed -n 's/^worker //p' <<<"$out")
}

install_all() { # Python, bigflax and the bucket's files onto every worker; may be run again
    say "installing on all workers, which takes some minutes"
    limit=1800 workers "mkdir -p bigflax && gcloud storage cp $folder/setup/worker bigflax/worker && bash bigflax/worker install $folder \$NODE $LOG_SECONDS"
}

start_all() { # starts what lies in the bucket, or nothing: where one worker does not start, the others stop again
    workers 'bash bigflax/worker start' && return
    local because=$why
    workers 'bash bigflax/worker stop' || true
    why=$because
    return 1
}

check_pod() { # for the scripts that start containers, which see no file of this machine
    case $PACKAGE in
        *://*) ;;
        . | */* | *.whl) fail "PACKAGE=$PACKAGE: a pod cannot see it; set PACKAGE to a requirement ('bigflax[tpu,gcs] @ git+https://...'), or to nothing with bigflax in IMAGE" 2 ;;
    esac
    case $CONFIG in *.py | *.py:*) fail "CONFIG=$CONFIG: a pod cannot see a file; put the recipe into IMAGE and give --config=PATH, or name one of bigflax's" 2 ;; esac
}

load_settings
check_settings
