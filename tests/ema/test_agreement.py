"""A teacher is the student with other weights, and weights of its own: what breaks that is refused and named."""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor, nn

from hf_ema_scaling.ema import (
    DeadTeacherError,
    EMATeacher,
    WeightAverage,
    check_agreement,
    check_before_labelling,
    check_liveness,
    check_parity,
)
from hf_ema_scaling.ema.differences import differences

IDS = {"input_ids": torch.tensor([[1, 2, 3, 4]])}
HEADS: dict[str, tuple[Callable[[], Any], dict[str, Tensor]]] = {
    "bert": (lambda: tiny.bert(dropout=0.5), IDS),
    "wav2vec2": (
        lambda: tiny.wav2vec2(dropout=0.5, layerdrop=0.5, masking=0.5),
        {"input_values": torch.randn(2, 800, generator=torch.Generator().manual_seed(0))},
    ),
    "parakeet": (
        lambda: tiny.parakeet(dropout=0.5),
        {"input_features": torch.randn(2, 64, 8, generator=torch.Generator().manual_seed(0))},
    ),
}


def checked(model: nn.Module, factory: Callable[[], nn.Module] | None = None, **options: Any) -> float:
    """Both checks, by an average that is not the student."""
    average = WeightAverage(model)
    teacher = EMATeacher(model, average, factory=factory, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    average.update(model, 0.7)
    gap = check_agreement(model, average, teacher, IDS)
    check_liveness(model, average, teacher, IDS)
    return gap


def tripled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 3.0 * output


def halved(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (0.5 * args[0], *args[1:])


@pytest.mark.parametrize("head", HEADS)
def test_equal_in_eval_mode_and_nothing_is_left_behind(head: str) -> None:
    make, inputs = HEADS[head]
    model = make().train()
    frozen = next(model.children())
    frozen.eval()
    average = WeightAverage(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    average.update(model, 0.7)
    teacher = EMATeacher(model, average)
    before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    held = {name: tensor.clone() for name, tensor in average.tensors().items()}
    modes, state = [part.training for part in model.modules()], torch.get_rng_state()
    assert not differences(model, teacher.module)
    assert check_agreement(model, average, teacher, inputs) < 1e-5
    check_liveness(model, average, teacher, inputs)
    assert tiny.same_bits(dict(model.state_dict()), before) and tiny.same_bits(dict(average.tensors()), held)
    assert [part.training for part in model.modules()] == modes and torch.equal(torch.get_rng_state(), state)
    # The student with its own weights says something else: what was compared was the average.
    model.eval().requires_grad_(False)
    assert float((model(**inputs).logits - teacher(**inputs).logits).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", ["closure", "global", "default", "inner", "partial", "container"])
def test_a_method_that_keeps_the_old_forward_is_refused_by_the_name_of_the_variable(kind: str) -> None:
    model = tiny.bert().eval()
    old = model.classifier.forward
    space: dict[str, Any] = {"old": old}
    exec("def read_global(self, x):\n    return 2.0 * old(x)", space)

    def by_closure(self: Any, x: Tensor) -> Tensor:
        return 2.0 * old(x)

    def by_default(self: Any, x: Tensor, old: Any = old) -> Tensor:
        return 2.0 * old(x)

    def inner(x: Tensor) -> Tensor:
        return old(x)

    def by_inner(self: Any, x: Tensor) -> Tensor:
        return 2.0 * inner(x)

    held = functools.partial(nn.functional.linear, weight=model.classifier.weight)

    def by_partial(self: Any, x: Tensor) -> Tensor:
        return 2.0 * held(x)

    parts = {"old": [model.classifier.bias]}

    def by_container(self: Any, x: Tensor) -> Tensor:
        return 2.0 * nn.functional.linear(x, self.weight) + parts["old"][0]

    function = {
        "closure": by_closure, "global": space["read_global"], "default": by_default, "inner": by_inner,
        "partial": by_partial, "container": by_container,
    }[kind]  # fmt: skip
    model.classifier.forward = types.MethodType(function, model.classifier)
    what = {
        "partial": r"'weight', the tensor 'classifier.weight'",
        "container": r"'item 0', the tensor 'classifier.bias'",
    }.get(kind, "'old', the forward of 'classifier'")
    with pytest.raises(TypeError, match=rf"replaced on classifier \(Linear\).* in {what}.*type\(self\)\.forward"):
        EMATeacher(model, WeightAverage(model))


def test_the_way_out_that_the_refusal_names_works() -> None:
    model = tiny.bert()

    def doubled(self: Any, x: Tensor) -> Tensor:
        return 2.0 * type(self).forward(self, x)

    model.classifier.forward = types.MethodType(doubled, model.classifier)
    assert checked(model) < 1e-5


def test_the_students_weights_are_seen_where_no_search_finds_them() -> None:
    """Outputs agree while the student holds the average; what tells is that they change with the student."""
    model = tiny.bert()
    hidden = types.SimpleNamespace(old=model.classifier.forward)

    def doubled(self: Any, x: Tensor) -> Tensor:
        return 2.0 * hidden.old(x)

    model.classifier.forward = types.MethodType(doubled, model.classifier)
    average = WeightAverage(model)
    teacher = EMATeacher(model, average)
    assert check_agreement(model, average, teacher, IDS) < 1e-5
    before = {name: tensor.clone() for name, tensor in (*model.state_dict().items(), *average.tensors().items())}
    with pytest.raises(DeadTeacherError, match=r"computes with the student's weights.*first what classifier returns"):
        check_liveness(model, average, teacher, IDS)
    after = dict((*model.state_dict().items(), *average.tensors().items()))
    assert tiny.same_bits(after, before) and average.num_updates == 0


def test_so_are_its_running_statistics() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.line(x))  # type: ignore[no-any-return]

    model = Net()

    def factory() -> nn.Module:
        made = Net()
        made._modules["norm"].forward = model.norm.forward  # type: ignore[union-attr,assignment]
        return made

    average = WeightAverage(model)
    inputs = {"x": torch.randn(4, 3)}
    check_liveness(model, average, EMATeacher(model, average, factory=Net), inputs)
    with pytest.raises(DeadTeacherError, match="first what norm returns"):
        check_liveness(model, average, EMATeacher(model, average, factory=factory), inputs)


@pytest.mark.parametrize("kind", ["hook", "pre-hook", "accelerate"])
def test_a_hook_that_changes_outputs_is_refused_by_name_and_one_that_does_not_is_not(kind: str) -> None:
    class Negative(ModelHook):
        def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
            return -output

    def put(model: Any) -> Any:
        if kind == "hook":
            model.bert.pooler.register_forward_hook(tripled)
        elif kind == "pre-hook":
            model.classifier.register_forward_pre_hook(halved)
        else:
            add_hook_to_module(model.classifier, Negative())
        return model

    named = {
        "hook": r"bert\.pooler \(BertPooler\) returns.*lacks: forward hook 'tripled' on bert\.pooler",
        "pre-hook": r"classifier \(Linear\) returns.*lacks: forward pre-hook 'halved' on classifier",
        "accelerate": r"classifier \(Linear\) returns.*lacks: accelerate's hook '.*Negative' on classifier",
    }[kind]
    with pytest.raises(
        DeadTeacherError, match=rf"differ by \S+ of their size, 0\.001 is allowed.*{named}.*`factory=`"
    ):
        checked(put(tiny.bert()))
    assert checked(put(tiny.bert()), lambda: put(tiny.bert(seed=1))) < 1e-5
    with pytest.raises(DeadTeacherError, match="Put the same into the model that `factory` returns"):
        checked(put(tiny.bert()), lambda: tiny.bert(seed=1))


def test_hooks_without_effect_are_called_and_not_refused() -> None:
    model, seen = tiny.bert(), []
    model.classifier.register_forward_hook(lambda module, args, output: seen.append(module))
    model.bert.register_forward_pre_hook(lambda module, args: None)
    assert checked(model) < 1e-5
    assert seen == [model.classifier]  # once, by the student; the teacher has none of it


def test_libraries_hooks_are_no_ground_for_a_refusal_or_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    model = tiny.bert()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    model.train()
    model(**IDS, output_hidden_states=True)  # transformers hooks the layers whose states it returns
    add_hook_to_module(model.bert.encoder, ModelHook())
    average = WeightAverage(model)
    EMATeacher(model, average)(**IDS)
    assert not [str(warning.message) for warning in recwarn if "teacher lacks" in str(warning.message)]
    assert checked(model) < 1e-5


def test_a_layer_of_another_class_is_refused_if_it_is_another_function() -> None:
    class Other(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.relu()

    class Same(nn.Linear):
        """Nothing new."""

    def put(model: Any) -> Any:
        model.bert.encoder.layer[0].intermediate.intermediate_act_fn = Other()
        return model

    where = r"bert\.encoder\.layer\.0\.intermediate\.intermediate_act_fn"
    with pytest.raises(
        DeadTeacherError, match=rf"first in what {where} .*Other in the place of GELUActivation on {where}"
    ):
        checked(put(tiny.bert()))
    assert checked(put(tiny.bert()), lambda: put(tiny.bert())) < 1e-5
    with pytest.raises(DeadTeacherError, match=rf"first in what {where} .*`factory` returns"):
        checked(put(tiny.bert()), tiny.bert)

    model = tiny.bert(dropout=0.3)
    model.dropout = nn.Identity()
    model.classifier.__class__ = Same
    with pytest.warns(UserWarning) as warned:
        assert checked(model) < 1e-5
        warnings.warn("the only one", stacklevel=1)
    assert [str(one.message) for one in warned] == ["the only one"]


def test_batch_norm_of_all_processes_is_batch_norm() -> None:
    make, inputs = HEADS["parakeet"]
    model = nn.SyncBatchNorm.convert_sync_batchnorm(make())
    assert any(isinstance(part, nn.SyncBatchNorm) for part in model.modules())
    average = WeightAverage(model)
    assert check_agreement(model, average, EMATeacher(model, average), inputs) < 1e-5


def test_a_value_that_was_set_by_hand_is_named() -> None:
    def put(model: Any) -> Any:
        model.bert.encoder.layer[0].output.LayerNorm.eps = 0.5
        return model

    with pytest.raises(DeadTeacherError, match=r"layer\.0\.output\.LayerNorm.*eps=0\.5 \(the teacher's: 1e-12\)"):
        checked(put(tiny.bert()))
    assert checked(put(tiny.bert()), lambda: put(tiny.bert())) < 1e-5


def test_a_method_other_than_forward_is_compared_by_what_it_does() -> None:
    model = tiny.bert()
    layer = model.bert.encoder.layer[0]
    layer.feed_forward_chunk = lambda hidden: hidden
    with pytest.raises(DeadTeacherError, match=r"first in what bert\.encoder\.layer\.0 \(BertLayer\) returns"):
        checked(model)


def test_a_factory_that_keeps_the_student_is_refused() -> None:
    model = tiny.bert()

    def factory() -> nn.Module:
        made = tiny.bert()
        made.classifier.forward = model.classifier.forward  # type: ignore[method-assign]
        return made

    with pytest.raises(DeadTeacherError, match=r"the student's weights.*first what classifier returns"):
        checked(model, factory)


def test_a_teacher_that_lacks_what_its_forward_needs_says_so() -> None:
    model = tiny.bert()
    model.classifier.scale = 2.0  # as kernels put onto an instance do
    model.classifier.forward = types.MethodType(
        lambda self, x: self.scale * type(self).forward(self, x), model.classifier
    )
    with pytest.raises(DeadTeacherError, match=r"cannot run inputs that the student runs \(AttributeError: .*'scale'"):
        checked(model)
    average = WeightAverage(model)
    with pytest.raises(DeadTeacherError, match=r"lacks what its forward asks for \(AttributeError: .*'scale'"):
        check_before_labelling(model, average, EMATeacher(model, average), IDS)


def test_an_average_in_the_students_storage_is_refused() -> None:
    model = tiny.bert()
    average = WeightAverage(model)
    average._shadow["classifier.bias"] = model.classifier.bias.data
    with pytest.raises(DeadTeacherError, match=r"'classifier.bias' of the average lies in the storage"):
        check_liveness(model, average, EMATeacher(model, average), IDS)


def test_a_first_call_without_a_check_warns_of_what_the_teacher_lacks() -> None:
    model = tiny.bert()
    model.classifier.register_forward_hook(tripled)
    average = WeightAverage(model)
    teacher = EMATeacher(model, average)
    with pytest.warns(
        UserWarning, match=r"teacher lacks: forward hook 'tripled' on classifier\..*check_before_labelling"
    ):
        teacher(**IDS)
    with pytest.warns(UserWarning) as warned:
        teacher(**IDS)
        EMATeacher(model, average, factory=lambda: hooked(tiny.bert()))(**IDS)
        warnings.warn("the only one", stacklevel=1)
    assert [str(one.message) for one in warned] == ["the only one"]


def hooked(model: Any) -> Any:
    model.classifier.register_forward_hook(tripled)
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tolerances_follow_the_precision(dtype: torch.dtype) -> None:
    unit = torch.finfo(dtype).eps

    def scaled(factor: float) -> Any:
        model = tiny.bert()
        model.classifier.register_forward_hook(lambda module, args, output: factor * output)
        return model

    def gap(model: nn.Module, **options: Any) -> float:
        average = WeightAverage(model)
        return check_agreement(model, average, EMATeacher(model, average, **options), IDS)

    # The student's weights are rounded, the teacher's are not; or the other way round.
    assert 0.01 * unit < gap(scaled(1.0).to(dtype)) < 16 * unit
    assert 0.01 * unit < gap(scaled(1.0), dtype=dtype) < 16 * unit
    with pytest.raises(DeadTeacherError, match=rf"{16 * unit:.3g} is allowed"):
        gap(scaled(1.0 + 32 * unit).to(dtype))
    # Under autocast both compute alike.
    with torch.autocast("cpu", dtype=dtype):
        assert gap(scaled(1.0)) < unit
        assert gap(scaled(1.0 + 2 * unit)) > unit
        with pytest.raises(DeadTeacherError, match=rf"{4 * unit:.3g} is allowed"):
            gap(scaled(1.0 + 8 * unit))
    assert gap(scaled(1.0005)) > 1e-4
    with pytest.raises(DeadTeacherError, match=r"0\.001 is allowed"):
        gap(scaled(1.002))
    model = scaled(1.0005)
    average = WeightAverage(model)
    with pytest.raises(DeadTeacherError, match=r"1e-05 is allowed"):
        check_agreement(model, average, EMATeacher(model, average), IDS, tolerance=1e-5)


def test_a_half_precision_copy_and_its_float32_teacher_are_measured_against_each_other_and_the_student() -> None:
    model = tiny.bert()
    average = WeightAverage(model)
    full, half = EMATeacher(model, average), EMATeacher(model, average, dtype=torch.bfloat16)
    assert check_agreement(model, average, full, IDS) < 1e-5
    parity = check_parity(half, full, IDS)
    assert check_agreement(model, average, half, IDS) == pytest.approx(parity, rel=1e-3)


def test_outputs_that_are_not_numbers_agree_only_with_their_like() -> None:
    model = tiny.bert()
    with torch.no_grad():
        model.classifier.bias[0] = float("nan")
    average = WeightAverage(model)
    teacher = EMATeacher(model, average)
    assert check_agreement(model, average, teacher, IDS) < 1e-5
    model.classifier.register_forward_hook(lambda module, args, output: output.nan_to_num(0.0))
    with pytest.raises(DeadTeacherError, match=r"differ by nan of their size"):
        check_agreement(model, average, teacher, IDS)


def test_a_compiled_student_is_compared_without_compiling() -> None:
    compiled = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    model = tiny.bert()
    model.bert.encoder.layer[0] = torch.compile(model.bert.encoder.layer[0], backend=backend)
    wrapped = torch.compile(model, backend=backend)
    average = WeightAverage(wrapped)
    teacher = EMATeacher(wrapped, average)
    assert check_agreement(wrapped, average, teacher, IDS) < 1e-5
    assert not compiled
    wrapped(**IDS)
    assert compiled
