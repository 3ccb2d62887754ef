"""Timeline hook: every operation of one step, of each rank, as a Chrome trace."""

from torch.profiler import ProfilerActivity, profile

from moesaic.checkpoint.run_directory import RunDir
from moesaic.core.files import make_dir
from moesaic.train.trainer import StepReport, Trainer
from moesaic.train.training_hooks import Hook


class TimelineHook(Hook):
    """Records step ``log.timeline_step`` to ``timelines/`` of the run; 0: none.

    The file has the operations of the CPU and, on a GPU, its kernels. Recording slows that step.
    """

    def __init__(self, run_dir: RunDir) -> None:
        self._folder = run_dir.timelines
        self._profile: profile | None = None

    def before_run(self, trainer: Trainer) -> None:
        self._start_before(trainer, step=trainer.step + 1)

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        if self._profile is not None:
            name = f"step-{report.step:08d}-rank-{trainer.world.rank}.json"
            make_dir(self._folder)
            self._stop().export_chrome_trace(str(self._folder / name))
        self._start_before(trainer, step=report.step + 1)

    def after_run(self, trainer: Trainer) -> None:
        del trainer
        if self._profile is not None:
            self._stop()

    def _start_before(self, trainer: Trainer, *, step: int) -> None:
        if step == trainer.run.log.timeline_step:
            kinds = [ProfilerActivity.CPU]
            if trainer.world.device.type == "cuda":
                kinds.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=kinds)
            self._profile.start()

    def _stop(self) -> profile:
        running, self._profile = self._profile, None
        assert running is not None
        running.stop()
        return running
