# shellcheck shell=bash disable=SC2034,SC2154
# What the batch scripts share. They source it in the repository's root.

say() { echo "$(date '+%F %T') $*"; }
fail() { echo "error: $*" >&2; exit "${code:-1}"; }

logs=runs/slurm/$SLURM_JOB_ID/${SLURM_RESTART_COUNT:-0}
mkdir -p "$logs"

# The script runs in a child, which looks for `$logs/asked` now and then. bash 5.2 parses a trap wrongly, and ends, when
# the signal comes while it expands a `$(...)`; this shell expands none.
if [ -z "${in_child:-}" ]; then
    rm -f "$logs/asked"
    trap ': > "$logs/asked"' USR1
    in_child=yes bash "$0" "$@" &
    while kill -0 $! 2> /dev/null; do wait $! || true; done
    code=0
    wait $! || code=$?
    exit "$code"
fi
unset in_child # a job that this one submits has none
trap '' USR1

begun=$(date +%FT%T)
asked=           # set when SLURM wants the machines back
last_moment=     # until when a run may go on then, if that is known
on_stop() { :; } # each script has its own

source slurm/site.conf
site_environment || code=2 fail "site_environment in slurm/site.conf failed: is the environment installed?"
export SLURM_EXPORT_ENV=ALL # the steps need what was set up here

children=() # process ids of the srun commands

# A command beside the others of this job, on the nodes and with the options given before `--`.
start() {
    local options=()
    while [ "$1" != -- ]; do options+=("$1"); shift; done
    shift
    # SIGUSR1 is for this script: it would end a launcher.
    srun --overlap --kill-on-bad-exit=1 --ntasks-per-node=1 --cpu-bind=none "${SRUN_OPTIONS[@]}" "${options[@]}" \
        bash -c 'trap "" USR1; exec "$@"' bash "$@" &
    children+=($!)
}

# A command where the job's commands run: in the container, if there is one.
here() {
    if [ ${#SRUN_OPTIONS[@]} -eq 0 ]; then "$@"; else
        srun --overlap --nodes=1 --ntasks=1 --nodelist="$SLURMD_NODENAME" "${SRUN_OPTIONS[@]}" "$@"
    fi
}

recipe() { here python -W ignore -m vision_r1_recipes.recipe "$1" "$recipe" "${@:2}" "${overrides[@]}"; }

notice() { [ -n "$asked" ] || [ ! -e "$logs/asked" ] || ask_to_stop; }
pause() { sleep "$1"; notice; }
alive() { kill -0 "$1" 2> /dev/null; }

# The code of one.
wait_for() {
    while alive "$1"; do pause 1; done
    wait "$1"
}

end_children() {
    local child
    for child in "${children[@]}"; do kill "$child" 2> /dev/null || true; done
    for child in "${children[@]}"; do wait_for "$child" || true; done
}

# SLURM takes the machines back soon, or somebody has sent `scancel --batch --signal=USR1`: note it, and the time left.
ask_to_stop() {
    local end left
    asked=yes
    end=$(SLURM_TIME_FORMAT=%s squeue --noheader --jobs="$SLURM_JOB_ID" --format=%e) || end=
    [[ $end =~ ^[0-9]+$ ]] || end=${SLURM_JOB_END_TIME:-0}
    left=$((end - $(date +%s)))
    if [ "$end" -gt 0 ] && [ "$left" -lt 8640000 ]; then # without a limit SLURM says a year
        say "asked to stop, $left seconds before the end"
        left=$((left < 0 ? 0 : left - (left < 80 ? left / 4 : 20)))
        last_moment=$(($(date +%s) + left))
        stop_timer
        (sleep "$left" && say "out of time" && requeue) & # whatever happens, come back
        timer=$!
    else
        say "asked to stop"
    fi
    on_stop
}

timer=
stop_timer() { [ -z "$timer" ] || kill "$timer" 2> /dev/null || true; }
trap stop_timer EXIT

# Preempted with a grace time, a job's steps get SIGTERM and this script nothing.
preempted() {
    local job
    job=$(SLURM_TIME_FORMAT=standard scontrol show job --oneliner "$SLURM_JOB_ID") || return 1
    [[ $job =~ PreemptTime=([0-9T:-]+) && ! ${BASH_REMATCH[1]} < $begun ]]
}

requeue() {
    say "requeued: the run goes on when the job starts again"
    scontrol requeue "$SLURM_JOB_ID" && sleep 60 # until SLURM ends this script
    fail "SLURM doesn't requeue this job (scontrol says why above): sbatch it again, it goes on where it was"
}

# The rest of a script: one command that keeps on the disk what it has finished. It can be ended at any time, and goes on
# when the job comes back.
go_on_with() {
    on_stop() { end_children; }
    notice
    [ -z "$asked" ] || requeue
    start --nodes=1 --ntasks=1 -- "$@"
    code=0
    wait_for "${children[0]}" || code=$?
    [ "$code" -ne 0 ] || exit 0
    if [ -n "$asked" ] || preempted; then requeue; fi
    fail "the command has ended with code $code, see above"
}

# Three starts without progress are enough. `$1` is what there is now.
check_progress() {
    local starts=runs/slurm/$SLURM_JOB_ID/starts
    echo "$1" >> "$starts"
    [ "$(tail -n 4 "$starts" | uniq -c | awk '{print $1}')" != 4 ] || fail \
        "three starts in a row have brought no progress, there is still: $1. A start must last until something is" \
        "saved. Give the job more time, the signal more lead (SBATCH_SIGNAL), or save more often (save_every_rollouts)."
}

# What option `$1` is given among the other arguments, in either spelling; nothing when it isn't there.
option() {
    local name=$1 before='' argument
    shift
    for argument in "$@"; do
        if [ "$before" = "$name" ]; then echo "$argument"; fi
        if [[ $argument == "$name="* ]]; then echo "${argument#*=}"; fi
        before=$argument
    done
}

# Nobody else may work on folder `$1`, a job that waits to come back included.
claim() {
    local other said
    mkdir -p "$1"
    other=$(cat "$1/job" 2> /dev/null) || other=
    if [ -n "$other" ] && [ "$other" != "$SLURM_JOB_ID" ]; then
        if ! said=$(squeue --noheader --jobs="$other" 2>&1); then
            [[ $said == *"Invalid job id"* ]] ||
                code=2 fail "job $other had $1, and squeue can't say whether it still has: $said"
            said=
        fi
        [ -z "$said" ] || code=2 fail "job $other has $1: wait for it, or scancel it"
    fi
    echo "$SLURM_JOB_ID" > "$1/job"
    sleep 2 # of jobs that come at the same time, the last one has it
    other=$(cat "$1/job")
    [ "$other" = "$SLURM_JOB_ID" ] || code=2 fail "job $other has $1: wait for it, or scancel it"
}
