#!/bin/bash
# @{about}
# Submit it from a directory that every node sees: runs are written there.
#SBATCH --job-name=@{name}
#SBATCH --nodes=@{nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=@{gpus}
#SBATCH --time=@{time}
#SBATCH --signal=B:TERM@@@{save_s}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=@{name}-%j.log
@{more}
set -uo pipefail

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# Slurm signals this shell before the time is over. The run saves, then the job goes back in line.
stopping=
stop() {
    stopping=yes
    scancel --signal=TERM "$SLURM_JOB_ID" # the steps, not this shell
}
trap stop TERM

srun --nodes=@{nodes} --ntasks-per-node=1 --kill-on-bad-exit=@{kill} \
    @{torchrun} &
step=$!
code=0
wait "$step" || code=$?
while kill -0 "$step" 2>/dev/null; do # a trapped signal ends a wait early
    code=0
    wait "$step" || code=$?
done

if [[ -n $stopping ]]; then
    if ((code == 0)); then exit 0; fi # it finished just in time
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
