// Test top with one 512-bit port: reads `bursts` bursts of 16 beats, `stride` bytes apart, as fast as the port takes them.
module skipopu_top (
  input clk, input rst, output reg irq,
  input [11:0] s_axil_awaddr, input s_axil_awvalid, output s_axil_awready,
  input [31:0] s_axil_wdata, input [3:0] s_axil_wstrb, input s_axil_wvalid, output s_axil_wready,
  output [1:0] s_axil_bresp, output reg s_axil_bvalid, input s_axil_bready,
  input [11:0] s_axil_araddr, input s_axil_arvalid, output s_axil_arready,
  output [31:0] s_axil_rdata, output [1:0] s_axil_rresp, output reg s_axil_rvalid, input s_axil_rready,
  output reg [63:0] m0_axi_araddr, output [7:0] m0_axi_arlen, output [2:0] m0_axi_arsize,
  output [1:0] m0_axi_arburst, output m0_axi_arvalid, input m0_axi_arready,
  input [511:0] m0_axi_rdata, input [1:0] m0_axi_rresp, input m0_axi_rlast, input m0_axi_rvalid, output m0_axi_rready,
  output [63:0] m0_axi_awaddr, output [7:0] m0_axi_awlen, output [2:0] m0_axi_awsize, output [1:0] m0_axi_awburst,
  output m0_axi_awvalid, input m0_axi_awready, output [511:0] m0_axi_wdata, output [63:0] m0_axi_wstrb,
  output m0_axi_wlast, output m0_axi_wvalid, input m0_axi_wready, input [1:0] m0_axi_bresp, input m0_axi_bvalid,
  output m0_axi_bready,
  output [63:0] mi_axi_araddr, output [7:0] mi_axi_arlen, output [2:0] mi_axi_arsize, output [1:0] mi_axi_arburst,
  output mi_axi_arvalid, input mi_axi_arready, input [255:0] mi_axi_rdata, input [1:0] mi_axi_rresp,
  input mi_axi_rlast, input mi_axi_rvalid, output mi_axi_rready
);
  assign m0_axi_awvalid = 0, m0_axi_wvalid = 0, m0_axi_bready = 1, mi_axi_arvalid = 0, mi_axi_rready = 1;
  assign s_axil_bresp = 0, s_axil_rresp = 0;

  // Registers: 0 bursts (starts), 4 stride, 8 first address, 0c beats per burst; reading gives the cycles of the last run.
  reg aw_held, w_held;
  reg [11:0] address;
  reg [31:0] value, left, unread, stride, cycles;
  reg [7:0] length;
  assign s_axil_awready = !aw_held, s_axil_wready = !w_held, s_axil_arready = !s_axil_rvalid, s_axil_rdata = cycles;
  assign m0_axi_arlen = length, m0_axi_arsize = 6, m0_axi_arburst = 1, m0_axi_arvalid = left != 0, m0_axi_rready = 1;

  always @(posedge clk) begin
    if (s_axil_awvalid && s_axil_awready) begin aw_held <= 1; address <= s_axil_awaddr; end
    if (s_axil_wvalid && s_axil_wready) begin w_held <= 1; value <= s_axil_wdata; end
    if (aw_held && w_held && !s_axil_bvalid) begin
      s_axil_bvalid <= 1;
      case (address)
        0: begin left <= value; unread <= value; cycles <= 0; irq <= 0; end
        4: stride <= value;
        8: m0_axi_araddr <= value;
        default: length <= value - 1;
      endcase
    end
    if (s_axil_bvalid && s_axil_bready) begin s_axil_bvalid <= 0; aw_held <= 0; w_held <= 0; end
    if (s_axil_arvalid && s_axil_arready) s_axil_rvalid <= 1;
    if (s_axil_rvalid && s_axil_rready) s_axil_rvalid <= 0;
    if (m0_axi_arvalid && m0_axi_arready) begin m0_axi_araddr <= m0_axi_araddr + stride; left <= left - 1; end
    if (unread != 0) cycles <= cycles + 1;
    if (m0_axi_rvalid && m0_axi_rlast) begin unread <= unread - 1; irq <= unread == 1; end
    if (rst) begin
      aw_held <= 0; w_held <= 0; s_axil_bvalid <= 0; s_axil_rvalid <= 0; left <= 0; unread <= 0; irq <= 0;
      stride <= 0; length <= 15; m0_axi_araddr <= 0; cycles <= 0;
    end
  end
endmodule
