#!/usr/bin/env bash
# A real SLURM of one node on this machine, as root: `cluster.sh start DIR`, `cluster.sh stop DIR`.
set -euo pipefail
command=${1:?start or stop}
dir=$(realpath -m "${2:?folder for its configuration, state and logs}")
cpus=$(nproc)
host=$(hostname -s)
memory=$(awk '/MemTotal/ {print int($2 / 1024 * 0.9)}' /proc/meminfo)

stop() {
    for daemon in slurmd slurmctld munged; do
        pid=$(cat "$dir/$daemon.pid" 2> /dev/null) && kill "$pid" 2> /dev/null && tail --pid="$pid" -f /dev/null
        rm -f "$dir/$daemon.pid"
    done
    return 0
}

case $command in
    start)
        for daemon in slurmctld slurmd munged sbatch; do
            command -v "$daemon" > /dev/null || { echo "$daemon is missing: apt-get install slurm-wlm munge" >&2; exit 1; }
        done
        mkdir -p "$dir"/{state,spool} /run/munge
        chown munge: /run/munge
        chmod 755 /run/munge
        if [ ! -s /etc/munge/munge.key ]; then
            (umask 077 && dd if=/dev/urandom of=/etc/munge/munge.key bs=1024 count=1 status=none)
            chown munge: /etc/munge/munge.key
        fi
        cat > "$dir/slurm.conf" << CONF
ClusterName=test
SlurmctldHost=$host
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
ReturnToService=2
KillWait=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
NodeName=$host CPUs=$cpus RealMemory=$memory State=UNKNOWN
PartitionName=test Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
        # munged is another user, who may not look into $dir
        runuser -u munge -- munged --pid-file=/run/munge/munged.pid --log-file=/run/munge/munged.log \
            --socket=/run/munge/munge.socket.2 --key-file=/etc/munge/munge.key
        cp /run/munge/munged.pid "$dir/munged.pid"
        trap stop ERR
        export SLURM_CONF=$dir/slurm.conf
        slurmctld -f "$SLURM_CONF"
        slurmd -f "$SLURM_CONF"
        for _ in $(seq 60); do
            if sinfo -h -o %T 2> /dev/null | grep -q idle; then
                echo "export SLURM_CONF=$SLURM_CONF"
                exit 0
            fi
            sleep 0.5
        done
        tail -n 20 "$dir"/*.log >&2
        stop
        exit 1
        ;;
    stop) stop ;;
esac
