# shellcheck shell=bash
# What the batch scripts share. They source it in the repository's root.

say() { echo "$(date '+%F %T') $*"; }
fail() { echo "error: $*" >&2; exit "${code:-1}"; }

asked=        # set when SLURM wants the machines back
on_stop() { :; } # each script has its own, called with the last moment, if there is one
trap ask_to_stop USR1

source slurm/site.conf
site_environment || code=2 fail "site_environment in slurm/site.conf failed: is the environment installed?"

logs=runs/slurm/$SLURM_JOB_ID/${SLURM_RESTART_COUNT:-0}
mkdir -p "$logs"
children=()   # process ids of the srun commands

# A command beside the others of this job, on the nodes and with the options given before `--`.
start() {
    local options=()
    while [ "$1" != -- ]; do options+=("$1"); shift; done
    shift
    # SIGUSR1 is for this script: it would end a launcher.
    srun --overlap --kill-on-bad-exit=1 --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" \
        "${SRUN_OPTIONS[@]}" "${options[@]}" bash -c 'trap "" USR1; exec "$@"' bash "$@" &
    children+=($!)
}

# A command where the job's commands run: in the container, if there is one.
here() {
    if [ ${#SRUN_OPTIONS[@]} -eq 0 ]; then "$@"; else
        srun --overlap --nodes=1 --ntasks=1 --nodelist="$SLURMD_NODENAME" "${SRUN_OPTIONS[@]}" "$@"
    fi
}

pause() { sleep "$1" & wait $! || true; }   # which a signal interrupts
alive() { kill -0 "$1" 2> /dev/null; }

# The code of one, however often a signal interrupts the waiting.
wait_for() {
    while alive "$1"; do wait "$1" || true; done
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
    [ -z "$asked" ] || return 0
    asked=yes
    last_moment=
    end=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%e) || end=
    if [[ $end == *T* ]]; then # there may be no limit
        left=$(($(date -d "$end" +%s) - $(date +%s)))
        say "asked to stop, $left seconds before the end"
        left=$((left - (left < 80 ? left / 4 : 20)))
        (sleep "$left" && say "out of time" && requeue) & # whatever happens, come back
        timer=$!
        trap 'kill $timer 2> /dev/null' EXIT
        last_moment=$(($(date +%s) + left))
    else
        say "asked to stop"
    fi
    on_stop "$last_moment"
}

requeue() {
    say "requeued: the run goes on when the job starts again"
    scontrol requeue "$SLURM_JOB_ID" && sleep 60 # until SLURM ends this script
    fail "SLURM doesn't requeue this job (scontrol says why above): sbatch it again, it goes on where it was"
}

# Three starts without progress are enough. `$1` is what there is now.
check_progress() {
    local starts=runs/slurm/$SLURM_JOB_ID/starts
    echo "$1" >> "$starts"
    [ "$(tail -n 4 "$starts" | uniq -c | awk '{print $1}')" != 4 ] || fail \
        "three starts in a row have brought no progress, there is still: $1. A start must last until something is" \
        "saved. Give the job more time, the signal more lead (SBATCH_SIGNAL), or save more often (save_every_rollouts)."
}
